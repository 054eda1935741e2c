"""The native loop: updates compiled together, over data that lies on the device.

What an update changes is given back to it (donated), so that weights and moments exist once. Nothing is read back
between two reports: losses stay on the device until a chunk of them is.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, subjaxprs
from numpy.typing import NDArray

from snapcore import Schedule
from snapcore.backend import Data, Report
from snapcore_jax.trees import is_key
from snapcore_jax.updates import Step, Training

CHUNK = 200
"""Updates between two reports, and at most in one compiled call: of small models, what is between calls shows."""


@dataclass(frozen=True, eq=False)
class Loop:
    """One module's updates and their batches, at a schedule's rates.

    Arguments:
        step: the update.
        data: gives the order.
        x: its examples, on the device.
        y: their targets, on the device.
        keys: the module's random keys; only their shapes count, see `run`.
        schedule: the rate of every update.
        at_once: updates in one compiled call, at most: 1, or up to `CHUNK` in a compiled loop. A whole chunk and one
            that the end cuts short are done by the same code: so nothing is compiled anew for cycles of another
            length, and wherever a run was interrupted, it resumes to the same bits.
    """

    step: Step
    data: Data
    x: jax.Array
    y: jax.Array
    keys: Any
    schedule: Schedule
    at_once: int = CHUNK

    def fitted(self, training: Training, key: jax.Array) -> "Loop":
        """Return the loop with as many updates in one compiled call as are fast on its device; nothing is computed.

        XLA's CPU compiler has no fast convolution within a loop: there an update of a CNN takes many times longer.
        """
        alone = replace(self, at_once=1)
        on_cpu = next(iter(self.x.devices())).platform == "cpu"
        return alone if on_cpu and convolves(alone.jaxpr(training, key)) else replace(self, at_once=CHUNK)

    def jaxpr(self, training: Training, key: jax.Array) -> Jaxpr:
        """Return what one compiled call does; what is traced for it is not traced again for `run`."""
        leaves, structure = jax.tree.flatten(training)
        keys, keys_structure = jax.tree.flatten(self.keys)
        updates = compiled(self.step, structure, keys_structure)
        traced: Jaxpr = updates.trace(leaves, keys, key, self.x, self.y, *self._numbers(0, 1)).jaxpr.jaxpr
        return traced

    def run(self, training: Training, key: jax.Array, start: int, stop: int, report: Report) -> Training:
        """Do updates `start … stop − 1`; report every loss, a chunk at a time.

        Arguments:
            training: what to continue from; it is given away.
            key: what dropout and the like draw from in update `step` comes from this key and `step` alone.
            start: updates done before.
            stop: updates done after.
            report: called with the updates done and the loss, while the chunk after is being computed.
        """
        leaves, structure = jax.tree.flatten(training)  # plain lists reach a compiled function many times faster
        keys, keys_structure = jax.tree.flatten(self.keys)
        updates = compiled(self.step, structure, keys_structure)
        losses: list[tuple[jax.Array, int]] = []
        reported = start
        for begin in range(start, stop, self.at_once):
            end = min(begin + self.at_once, stop)
            leaves, latest = updates(leaves, keys, key, self.x, self.y, *self._numbers(begin, end))
            if begin - reported >= CHUNK:
                reported = _flush(losses, reported, report)
            losses.append((latest, end - begin))
        _flush(losses, reported, report)
        result: Training = jax.tree.unflatten(structure, leaves)
        return result

    def _numbers(self, start: int, stop: int) -> tuple[np.int32, np.int32, NDArray[Any], NDArray[np.int32]]:
        rates = np.array([self.schedule(step) for step in range(start, stop)], jnp.result_type(float))
        rows = self.data.indices(start, stop).astype(np.int32)
        batch = rows.shape[1:]
        # What fills them up to the size that is compiled is not looked at.
        rates, rows = np.resize(rates, self.at_once), np.resize(rows, (self.at_once, *batch))
        return np.int32(start), np.int32(stop - start), rates, rows


def convolves(jaxpr: Jaxpr) -> bool:
    """Return whether there is a convolution in what was traced, at any depth."""
    here = any(equation.primitive is lax.conv_general_dilated_p for equation in jaxpr.eqns)
    return here or any(map(convolves, subjaxprs(jaxpr)))


@functools.lru_cache(maxsize=32)
def compiled(step: Step, structure: Any, keys_structure: Any) -> Any:
    """Return the function that does some updates at once: from the leaves of a `Training` to those that follow.

    Arguments:
        step: the update.
        structure: of the `Training`.
        keys_structure: of the module's random keys.

    Returns:
        A compiled function of leaves (given away), leaves of the keys, the run's key, examples, labels, the number of
        the first update, how many to do, and by update its rate and its batch; it gives the leaves and the losses.
    """

    def updates(
        leaves: Any, keys: Any, key: Any, x: Any, y: Any, first: Any, number: Any, rates: Any, rows: Any
    ) -> tuple[list[Any], Any]:
        own = jax.tree.unflatten(keys_structure, keys)

        def update(index: Any, carry: tuple[Training, Any]) -> tuple[Training, Any]:
            training, losses = carry
            fresh, batch = _reseeded(own, jax.random.fold_in(key, first + index)), rows[index]
            training, loss = step(training, fresh, x[batch], y[batch], rates[index])
            return training, losses.at[index].set(loss)

        begun = jax.tree.unflatten(structure, leaves), jnp.zeros_like(rates)
        # A loop of one turn is still a loop to XLA.
        training, losses = update(0, begun) if len(rates) == 1 else lax.fori_loop(0, number, update, begun)
        return jax.tree.leaves(training), losses

    return jax.jit(updates, donate_argnums=0)


def _reseeded(keys: Any, key: Any) -> Any:
    """Give every random key a value of its own, made of `key` and its position, and every count of draws a 0."""
    leaves, treedef = jax.tree.flatten(keys)
    return jax.tree.unflatten(
        treedef,
        [
            jax.random.split(jax.random.fold_in(key, position), leaf.shape) if is_key(leaf) else jnp.zeros_like(leaf)
            for position, leaf in enumerate(leaves)
        ],
    )


def _flush(losses: list[tuple[jax.Array, int]], reported: int, report: Report) -> int:
    for step, loss in enumerate((loss for chunk, n in losses for loss in np.asarray(chunk)[:n].tolist()), reported + 1):
        report(step, loss)
        reported = step
    losses.clear()
    return reported
