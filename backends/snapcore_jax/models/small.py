"""The built-in models in Flax NNX: small, fast on a CPU, and of the same shape in every framework.

Weights begin as Flax's layers do: normal with variance 1/fan-in, biases at 0.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from snapcore import DataError

Factory = Callable[[tuple[int, ...], int, nnx.Rngs], nnx.Module]
"""Makes a module from the shape of one example, the number of classes, and the random keys of its weights."""

_HIDDEN = 128


class Mlp(nnx.Module):
    """Two hidden layers of 128 units over the flattened example.

    Arguments:
        input_shape: of one example, such as (1, 28, 28).
        n_classes: width of the output, which are logits.
        rngs: the keys of the weights.
    """

    def __init__(self, input_shape: tuple[int, ...], n_classes: int, rngs: nnx.Rngs) -> None:
        widths = (math.prod(input_shape), _HIDDEN, _HIDDEN)
        self.hidden = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths)])
        self.output = nnx.Linear(_HIDDEN, n_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits for examples of any shape, [batch, …]."""
        x = lax.collapse(x, 1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.output(x)


class Cnn(nnx.Module):
    """Three convolutions with batch normalisation, each pooled, and a head with one hidden layer.

    Images come as [batch, channels, height, width], as they lie in the data; the convolutions see them with the
    channels last. Batch normalisation has the constants of PyTorch's (ε = 1e-5, running statistics that move by a
    tenth); what differs is that Flax's running variance is of n values, PyTorch's of n − 1.

    Arguments:
        input_shape: of one example: (channels, height, width), each side 8 or more.
        n_classes: width of the output, which are logits.
        rngs: the keys of the weights.

    Raises:
        DataError: the examples are no images, or smaller than 8 × 8.
    """

    def __init__(self, input_shape: tuple[int, ...], n_classes: int, rngs: nnx.Rngs) -> None:
        if len(input_shape) != 3 or min(input_shape[1:]) < 8:
            raise DataError(f"cnn needs examples of (channels, height, width), each side 8 or more; got {input_shape}")
        channels, height, width = input_shape
        widths = (channels, 32, 64, 128)
        self.blocks = nnx.List([_Block(*pair, rngs) for pair in itertools.pairwise(widths)])
        self.hidden = nnx.Linear(widths[-1] * (height // 8) * (width // 8), _HIDDEN, rngs=rngs)
        self.output = nnx.Linear(_HIDDEN, n_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits for images, [batch, channels, height, width]."""
        x = jnp.moveaxis(x, 1, -1)
        for block in self.blocks:
            x = block(x)
        return self.output(nnx.relu(self.hidden(lax.collapse(x, 1))))


class Fcn(nnx.Module):
    """Five 3 × 3 convolutions of 32 channels with batch normalisation, and a linear layer on each pixel.

    Images come as [batch, channels, height, width], and batch normalisation is as in `Cnn`. A pixel's outputs depend on
    the 11 × 11 around it.

    Arguments:
        input_shape: of one example: (channels, height, width).
        n_classes: numbers for each pixel, such as logits.
        rngs: the keys of the weights.

    Raises:
        DataError: the examples are no images.
    """

    def __init__(self, input_shape: tuple[int, ...], n_classes: int, rngs: nnx.Rngs) -> None:
        if len(input_shape) != 3:
            raise DataError(f"fcn needs examples of (channels, height, width), got {input_shape}")
        widths = (input_shape[0], 32, 32, 32, 32, 32)
        self.blocks = nnx.List([_Convolution(*pair, rngs) for pair in itertools.pairwise(widths)])
        self.output = nnx.Linear(widths[-1], n_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return outputs for every pixel, [batch, height, width, n_classes]."""
        x = jnp.moveaxis(x, 1, -1)
        for block in self.blocks:
            x = block(x)
        return self.output(x)


class _Convolution(nnx.Module):
    def __init__(self, before: int, after: int, rngs: nnx.Rngs) -> None:
        self.convolution = nnx.Conv(before, after, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(after, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.convolution(x)
        return nnx.relu(self.norm(x).astype(x.dtype))  # its statistics are float32, whatever the rest is computed in


class _Block(_Convolution):
    def __call__(self, x: jax.Array) -> jax.Array:
        pooled: jax.Array = nnx.max_pool(super().__call__(x), (2, 2), strides=(2, 2))
        return pooled


MODELS: dict[str, Factory] = {"mlp": Mlp, "cnn": Cnn, "fcn": Fcn}
