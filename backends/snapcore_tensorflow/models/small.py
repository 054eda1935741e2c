"""The built-in models; Keras' own."""

from snapcore_keras.models import MODELS, Factory, cnn, fcn, mlp

__all__ = ["MODELS", "Factory", "cnn", "fcn", "mlp"]
