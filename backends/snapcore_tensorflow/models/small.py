"""The built-in models; Keras' own."""

from snapcore_keras.models import MODELS, Factory, cnn, mlp

__all__ = ["MODELS", "Factory", "cnn", "mlp"]
