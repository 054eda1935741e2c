"""The ways to run all members on one batch, each compiled once for every shape of batch."""

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snapcore import DataError
from snapcore.ensemble import Pooling


class Static:
    """What a tree holds beside arrays: compiled for its value, and compiled again for another.

    Arguments:
        structure: of the whole tree.
        values: the leaves that are no arrays, and None for each that is.
    """

    def __init__(self, structure: Any, values: Sequence[Any]) -> None:
        self._structure, self._values = structure, tuple(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def combine(self, arrays: Sequence[Any]) -> Any:
        """Return the tree with `arrays` for those that `partition` took out."""
        given = iter(arrays)
        return jax.tree.unflatten(self._structure, [next(given) if value is None else value for value in self._values])

    def _key(self) -> Hashable:
        return self._structure, tuple((type(value), value) for value in self._values)  # True is not 1


def partition(tree: Any) -> tuple[list[Any], Static]:
    """Return the arrays of a tree, and the rest of it; `Static.combine` puts them together again."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = [(leaf, isinstance(leaf, jax.Array | np.ndarray | np.generic)) for leaf in leaves]
    arrays = [leaf for leaf, is_array in kinds if is_array]
    return arrays, Static(structure, [None if is_array else leaf for leaf, is_array in kinds])


Weights = list[Any]
"""A member's arrays, in the order of its tree."""
Batch = tuple[list[Any], Static]
"""The arguments of a call, partitioned."""
Member = Callable[[Weights, Batch, bool], jax.Array]
"""Gives one member's probabilities, or where told so their logarithms."""
Every = Callable[[Any, Batch, bool], jax.Array]
"""Gives every member's, the member axis first."""


class Strategy:
    """One way to run all members, compiled.

    Arguments:
        weights: the members' arrays, in the form that `every` takes them.
        every: gives all members' probabilities.
        pooling: makes one prediction of them.
        where: which devices it runs on: the batch is put there, and what comes out is put on this process's first.
    """

    def __init__(self, weights: Any, every: Every, pooling: Pooling, where: NamedSharding | None = None) -> None:
        def each(weights: Any, arrays: list[Any], static: Static, log: bool) -> jax.Array:
            return every(weights, (arrays, static), log)

        def mean(weights: Any, arrays: list[Any], static: Static, log: bool) -> jax.Array:
            stack = every(weights, (arrays, static), pooling.in_logs(log))
            pooled: jax.Array = pooling.pooled_stack(stack, log=log)
            return pooled

        self._weights, self._where = weights, where
        self._mean, self._each = jax.jit(mean, static_argnums=(2, 3)), jax.jit(each, static_argnums=(2, 3))

    def over(self, weights: Any) -> "Strategy":
        """Return the same, compiled once for both, of other weights in the same form."""
        other = copy.copy(self)
        other._weights = weights
        return other

    def mean(self, batch: Batch, *, log: bool = False) -> jax.Array:
        """Return the mean probabilities."""
        return self._run(self._mean, batch, log)

    def each(self, batch: Batch) -> jax.Array:
        """Return every member's probabilities, the member axis first."""
        return self._run(self._each, batch, False)

    def _run(self, compiled: Callable[..., jax.Array], batch: Batch, log: bool) -> jax.Array:
        arrays, static = batch
        if self._where is None:
            return compiled(self._weights, arrays, static, log)
        found = compiled(self._weights, jax.device_put(arrays, self._where), static, log)
        first: jax.Array = jax.device_put(found, jax.local_devices()[0])
        return first


def loop(member: Member, members: Sequence[Weights], pooling: Pooling) -> Strategy:
    """Run one member after the other, in one compiled function."""

    def every(members: Sequence[Weights], batch: Batch, log: bool) -> jax.Array:
        return jnp.stack([member(weights, batch, log) for weights in members])

    return Strategy(tuple(members), every, pooling)


def stacked(member: Member, members: Sequence[Weights], pooling: Pooling) -> Strategy:
    """Run all members at once: their arrays stacked, the function vectorised over them (`jax.vmap`)."""
    return Strategy(_stacks(members), _vectorised(member), pooling)


def mapped(member: Member, members: Sequence[Weights], pooling: Pooling) -> Strategy:
    """Run one member at a time, compiled for one (`jax.lax.map`): the least to compile, and the least memory."""

    def every(weights: Weights, batch: Batch, log: bool) -> jax.Array:
        found: jax.Array = lax.map(lambda each: member(each, batch, log), weights)
        return found

    return Strategy(_stacks(members), every, pooling)


def sharded(member: Member, members: Sequence[Weights], pooling: Pooling) -> Strategy:
    """Run the members spread over this process's devices; the batch goes to all of them.

    Each device runs as many. Where members do not divide, the last one is run again to fill up, and left out.

    Raises:
        DataError: there is one device, or one member.
    """
    devices = jax.local_devices()
    if min(len(members), len(devices)) == 1:
        raise DataError(
            "strategy 'sharded' spreads members over several devices, which cannot be done with "
            f"{len(members)} members and {len(devices)} devices: use another strategy"
        )
    each_runs = -(-len(members) // len(devices))
    count = -(-len(members) // each_runs)  # fewer devices do, where each of them runs as many
    filled = [*members, *[members[-1]] * (count * each_runs - len(members))]
    mesh, spread = Mesh(np.array(devices[:count]), ("members",)), PartitionSpec("members")

    def every(weights: Weights, batch: Batch, log: bool) -> jax.Array:
        arrays, static = batch
        local = _vectorised(member)
        run: Callable[..., jax.Array] = jax.shard_map(
            lambda weights, arrays: local(weights, (arrays, static), log),
            mesh=mesh,
            in_specs=(spread, PartitionSpec()),
            out_specs=spread,
        )
        return run(weights, arrays)[: len(members)]

    weights = jax.device_put(_stacks(filled), NamedSharding(mesh, spread))
    return Strategy(weights, every, pooling, NamedSharding(mesh, PartitionSpec()))


STRATEGIES: dict[str, Callable[[Member, Sequence[Weights], Pooling], Strategy]] = {
    "loop": loop,
    "stacked": stacked,
    "map": mapped,
    "sharded": sharded,
}


def _vectorised(member: Member) -> Every:
    def every(weights: Weights, batch: Batch, log: bool) -> jax.Array:
        found: jax.Array = jax.vmap(lambda each: member(each, batch, log))(weights)
        return found

    return every


def _stacks(members: Sequence[Weights]) -> Weights:
    made: dict[tuple[int, ...], jax.Array] = {}
    for same in zip(*members, strict=True):
        tied = tuple(map(id, same))  # what two layers share is stacked once
        if tied not in made:
            made[tied] = jnp.stack(same)
    return [made[tuple(map(id, same))] for same in zip(*members, strict=True)]
