"""What the parts on JAX share: the device, a network, a dense update, and a tree's bytes."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

DEVICE = jax.devices()[0]
GPU = DEVICE.platform in ("gpu", "cuda", "rocm")
Update = Callable[[Any, Any, jax.Array, jax.Array], tuple[Any, Any]]
"""From weights, optimizer state and a batch to the weights and the state that follow."""


def about() -> dict[str, Any]:
    """Return what a number measured here depends on."""
    found = {"jax": jax.__version__, "optax": optax.__version__, "gpu": GPU, "device": DEVICE.device_kind}
    return {**found, "platform": DEVICE.client.platform_version, "no_gpu": "JAX finds no GPU"}


def bits(named: dict[str, Any]) -> dict[str, bytes]:
    """Return arrays' bytes, once the device has computed them."""
    return {name: np.array(array).tobytes() for name, array in named.items()}


def noise(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Return normal noise: from NumPy, which compiles nothing."""
    return jnp.array(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def made(module: Callable[[], nnx.Module], seed: int = 0) -> tuple[Any, Any]:
    """Return a module that has no random keys, with noise for weights; nothing is compiled for it."""
    graph, state = nnx.split(nnx.eval_shape(module))
    # Variances must not be negative.
    return graph, jax.tree.map(lambda leaf: jnp.abs(noise(*leaf.shape, seed=seed, dtype=leaf.dtype)) / 10, state)


def dense(width: int, layers: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Return the weights and biases of dense layers of one width, on the device."""
    random = np.random.default_rng(0)
    weights = [random.standard_normal((width, width), np.float32) / np.float32(width**0.5) for _ in range(layers)]
    named = {f"w{n:02}": jnp.array(each, dtype) for n, each in enumerate(weights)}
    return jax.block_until_ready({**named, **{f"b{n:02}": jnp.zeros(width, dtype) for n in range(layers)}})


def outputs(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Return what dense layers make of a batch."""
    for n in range(len(params) // 2):
        x = jax.nn.relu(x @ params[f"w{n:02}"] + params[f"b{n:02}"])
    return x


def dense_update(optimizer: optax.GradientTransformation) -> Update:
    """Return one update of dense layers, not compiled."""

    def objective(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.square(outputs(params, x) - y).mean()

    def update(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        changes, state = optimizer.update(jax.grad(objective)(params, x, y), state, params)
        return optax.apply_updates(params, changes), state

    return update


def donating(update: Update) -> Update:
    """Return an update compiled, with weights and optimizer state given away to it."""
    compiled: Update = jax.jit(update, donate_argnums=(0, 1))
    return compiled


class Cnn(nnx.Module):
    """Convolutions with batch normalisation and dropout, pooled over the image."""

    def __init__(
        self, input_shape: tuple[int, ...], n_classes: int, rngs: nnx.Rngs, *, width: int = 16, dropout: float = 0.0
    ) -> None:
        widths = (input_shape[0], width, 2 * width, 4 * width)
        self.convolutions = nnx.List(
            [nnx.Conv(*pair, (3, 3), strides=2, rngs=rngs) for pair in itertools.pairwise(widths)]
        )
        self.norms = nnx.List([nnx.BatchNorm(each, rngs=rngs) for each in widths[1:]])
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else nnx.identity
        self.output = nnx.Linear(widths[-1], n_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 1, -1)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return self.output(self.dropout(x.mean((1, 2))))


class Mlp(nnx.Module):
    """Two hidden layers, with dropout."""

    def __init__(
        self, input_shape: tuple[int, ...], n_classes: int, rngs: nnx.Rngs, *, width: int = 128, dropout: float = 0.0
    ) -> None:
        pixels = int(np.prod(input_shape))
        self.first, self.second = nnx.Linear(pixels, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else nnx.identity
        self.output = nnx.Linear(width, n_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(x.reshape(len(x), -1)))
        return self.output(self.dropout(nnx.relu(self.second(x))))
