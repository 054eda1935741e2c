"""The built-in models, by name in `MODELS`."""

from snapcore_jax.models.small import MODELS, Cnn, Factory, Fcn, Mlp

__all__ = ["MODELS", "Cnn", "Factory", "Fcn", "Mlp"]
