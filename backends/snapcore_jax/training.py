"""The native loop: updates compiled together, over data that lies on the device.

What an update changes is given back to it (donated), so that weights and moments exist once. Nothing is read back
between two reports: losses stay on the device until a chunk of them is.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from snapcore import Schedule
from snapcore.backend import Data, Report
from snapcore_jax.trees import is_key
from snapcore_jax.updates import Step, Training

CHUNK = 50
"""Updates between two reports; on an accelerator they are compiled as one."""


@dataclass(frozen=True, eq=False)
class Loop:
    """One module's updates and their batches, at a schedule's rates.

    Arguments:
        step: the update.
        data: gives the order.
        x: its examples, on the device.
        y: their labels, on the device.
        keys: the module's random keys; only their shapes count, see `run`.
        schedule: the rate of every update.
        stretch: updates that are compiled as one, 1 … `CHUNK`; those left over are done one by one, so that nothing
            is compiled anew for cycles of another length.
    """

    step: Step
    data: Data
    x: jax.Array
    y: jax.Array
    keys: Any
    schedule: Schedule
    stretch: int = CHUNK

    def run(self, training: Training, key: jax.Array, start: int, stop: int, report: Report) -> Training:
        """Do updates `start … stop − 1`; report every loss, a chunk at a time.

        Arguments:
            training: what to go on with; it is given away.
            key: what dropout and the like draw from in update `step` comes from this key and `step` alone.
            start: updates done before.
            stop: updates done after.
            report: called with the updates done and the loss, while the chunk after is being computed.
        """
        leaves, structure = jax.tree.flatten(training)  # plain lists reach a compiled function many times faster
        keys, keys_structure = jax.tree.flatten(self.keys)
        updates = compiled(self.step, structure, keys_structure)
        losses: list[jax.Array] = []
        reported = start
        for begin, end in self._stretches(start, stop):
            leaves, latest = updates(leaves, keys, key, self.x, self.y, *self._numbers(begin, end))
            if begin - reported >= CHUNK:
                reported = _flush(losses, reported, report)
            losses.append(latest)
        _flush(losses, reported, report)
        result: Training = jax.tree.unflatten(structure, leaves)
        return result

    def _numbers(self, start: int, stop: int) -> tuple[NDArray[Any], ...]:
        rates = [self.schedule(step) for step in range(start, stop)]
        rows = self.data.indices(start, stop).astype(np.int32)
        return np.arange(start, stop, dtype=np.int32), np.array(rates, jnp.result_type(float)), rows

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        while start < stop:
            end = start + (self.stretch if start + self.stretch <= stop else 1)
            yield start, end
            start = end


def best_stretch(device: jax.Device) -> int:
    """Return how many updates to compile as one on a device.

    XLA's CPU compiler has no fast convolution within a loop: there an update of a CNN takes many times longer.
    """
    return 1 if device.platform == "cpu" else CHUNK


@functools.lru_cache(maxsize=32)
def compiled(step: Step, structure: Any, keys_structure: Any) -> Callable[..., tuple[list[jax.Array], jax.Array]]:
    """Return the function that does some updates at once: from the leaves of a `Training` to those that follow.

    Arguments:
        step: the update.
        structure: of the `Training`.
        keys_structure: of the module's random keys.

    Returns:
        A function of leaves (given away), leaves of the keys, the run's key, examples, labels, and by update its
        number, its rate and its batch; it gives the leaves and the losses.
    """

    def updates(
        leaves: Any, keys: Any, key: Any, x: Any, y: Any, steps: Any, rates: Any, rows: Any
    ) -> tuple[list[Any], Any]:
        own = jax.tree.unflatten(keys_structure, keys)

        def update(training: Training, each: tuple[Any, Any, Any]) -> tuple[Training, Any]:
            number, rate, batch = each
            return step(training, _reseeded(own, jax.random.fold_in(key, number)), x[batch], y[batch], rate)

        training = jax.tree.unflatten(structure, leaves)
        if len(steps) > 1:
            training, losses = lax.scan(update, training, (steps, rates, rows))
        else:  # a loop of one turn is still a loop to XLA
            training, loss = update(training, (steps[0], rates[0], rows[0]))
            losses = loss[None]
        return jax.tree.leaves(training), losses

    return jax.jit(updates, donate_argnums=0)


def _reseeded(keys: Any, key: Any) -> Any:
    """Give every random key a value of its own, made of `key` and its place, and every count of draws a 0."""
    leaves, treedef = jax.tree.flatten(keys)
    return jax.tree.unflatten(
        treedef,
        [
            jax.random.split(jax.random.fold_in(key, place), leaf.shape) if is_key(leaf) else jnp.zeros_like(leaf)
            for place, leaf in enumerate(leaves)
        ],
    )


def _flush(losses: list[jax.Array], reported: int, report: Report) -> int:
    for step, loss in enumerate((loss for chunk in losses for loss in np.asarray(chunk).tolist()), reported + 1):
        report(step, loss)
        reported = step
    losses.clear()
    return reported
