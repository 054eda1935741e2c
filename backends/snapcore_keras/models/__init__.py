"""The built-in models, by name in `MODELS`."""

from snapcore_keras.models.small import MODELS, Factory, cnn, fcn, mlp

__all__ = ["MODELS", "Factory", "cnn", "fcn", "mlp"]
