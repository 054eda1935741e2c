"""The built-in models, by name in `MODELS`."""

from snapcore_tensorflow.models.small import MODELS, Factory, cnn, mlp

__all__ = ["MODELS", "Factory", "cnn", "mlp"]
