"""One update, as it is compiled: forward, backward, and the optimizer at a rate it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snapcore_jax.losses import Loss, cross_entropy

Optimizer = Callable[[optax.Schedule], optax.GradientTransformation]
"""Makes an optimizer of a schedule, which is the program's, whatever the optimizer counts."""


class Training(NamedTuple):
    """What updates change: given away to each of them."""

    params: Any
    others: Any
    """Variables that are no parameters, such as batch statistics."""
    optimizer: Any


@dataclass(frozen=True)
class Sgd:
    """The paper's optimizer: momentum in Nesterov's form, and weight decay within the gradient, on all parameters.

    Arguments:
        momentum: 0 … 1.
        weight_decay: what of each weight is added to its gradient.
    """

    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __call__(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Return the transformation at the rates of a schedule."""
        sgd = optax.sgd(rate, momentum=self.momentum or None, nesterov=self.momentum > 0)
        return optax.chain(optax.add_decayed_weights(self.weight_decay), sgd)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, on all parameters.

    Arguments:
        weight_decay: what of each weight is taken off it, times the rate.
    """

    weight_decay: float = 1e-4

    def __call__(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Return the transformation at the rates of a schedule."""
        return optax.adamw(rate, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Step:
    """All that is compiled into an update; two that are equal are compiled once.

    Arguments:
        graph: the module without its arrays, in training mode; it takes a batch of inputs.
        optimizer: see `Optimizer`.
        dtype: what to compute in, such as `jnp.bfloat16`; None keeps the weights'.
        mesh: the devices; the batch is split over the first axis.
        loss: of (outputs in float32, targets), a scalar.
    """

    graph: Any
    optimizer: Optimizer
    dtype: Any = None
    mesh: Mesh | None = None
    loss: Loss = cross_entropy

    def __call__(self, training: Training, keys: Any, x: Any, y: Any, rate: Any) -> tuple[Training, Any]:
        """Do one update; return what it changed, and the loss."""
        x, y = self._split(x), self._split(y)

        def objective(params: Any) -> tuple[Any, Any]:
            model = nnx.merge(self.graph, self._narrow(params), keys, training.others, copy=True)
            loss = self.loss(model(self._narrow(x)).astype(jnp.float32), y)
            return loss, split(nnx.state(model)).others

        (loss, others), gradients = jax.value_and_grad(objective, has_aux=True)(training.params)
        optimizer = self.optimizer(lambda _: rate)  # whatever it counts, this is the rate of this update
        updates, moments = optimizer.update(gradients, training.optimizer, training.params)
        params = optax.apply_updates(training.params, updates)
        return self._whole(Training(params, others, moments)), loss

    def _narrow(self, tree: Any) -> Any:
        if self.dtype is None:
            return tree
        return jax.tree.map(lambda a: a.astype(self.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    def _split(self, batch: Any) -> Any:
        if self.mesh is None:
            return batch
        return lax.with_sharding_constraint(batch, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names[0])))

    def _whole(self, tree: Any) -> Any:
        return tree if self.mesh is None else lax.with_sharding_constraint(tree, whole(self.mesh))


class Parts(NamedTuple):
    """A module's state by what becomes of it."""

    params: Any
    keys: Any
    others: Any


def split(state: Any) -> Parts:
    """Return a state's parameters, random keys, and other variables."""
    return Parts(*nnx.split_state(state, nnx.Param, nnx.RngState, ...))


def whole(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a copy of everything on each device of a mesh."""
    return NamedSharding(mesh, PartitionSpec())
