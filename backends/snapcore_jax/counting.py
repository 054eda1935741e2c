"""The count of updates that an optimizer keeps itself, and a reset of its moments that leaves the count alone."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from snapcore import ProtocolError

Optimizer = Any
"""An `optax.GradientTransformation`, or a function from variables to a new optimizer state."""

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_COUNTING = (optax.MultiStepsState, optax.ScaleByScheduleState, *_INJECTED)


def read_count(rest: Any) -> int | None:
    """Return how many updates the optimizer has done, by its own count; None if it keeps none.

    That is the count by which schedules are evaluated, and with `optax.MultiSteps` its gradient steps. The count of
    Adam and its like is another: it belongs to the moments. Reading waits for the update that is being done.

    Arguments:
        rest: any tree with an optimizer's state in it.
    """
    counts = [int(jnp.copy(count)) for count in _counts(rest)]  # of a copy: what the host has seen is not donated
    return max(counts, default=None)


def with_new_moments(optimizer: Optimizer, variables: Any, rest: Any) -> Any:
    """Return `rest` with the optimizer's state as new, but for the counts and rates of its schedules.

    Arguments:
        optimizer: makes the new state. A transformation is given the arrays among the variables, or those under
            `"params"`.
        variables: what it is made for.
        rest: where the old state is.

    Raises:
        ProtocolError: a state of that structure is not in `rest`, or more than once.
    """
    for fresh in _fresh_states(optimizer, variables):
        if not jax.tree.leaves(fresh):
            return rest
        is_state = _like(fresh)
        nodes, structure = jax.tree.flatten(rest, is_leaf=lambda node: _is_module(node) or is_state(node))  # noqa: B023
        if sum(map(is_state, nodes)) == 1:
            return jax.tree.unflatten(
                structure, [_carried_over(fresh, each) if is_state(each) else each for each in nodes]
            )
    raise ProtocolError(
        "the state that optimizer= makes must be in `rest` once, with its shapes: pass the transformation that made "
        "it, or a function such as lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param)"
    )


def _counts(rest: Any) -> list[jax.Array]:
    nodes = list(_counting_nodes(rest))
    accumulated = [node.gradient_step for node in nodes if isinstance(node, optax.MultiStepsState)]
    found = accumulated or [node.count for node in nodes]
    # Flax wraps a count in a variable; that of an optimizer of several models at once is no scalar.
    arrays = [array for count in found for array in jax.tree.leaves(count) if jnp.ndim(array) == 0]
    return [array.addressable_data(0) if isinstance(array, jax.Array) else array for array in arrays]


def _counting_nodes(tree: Any) -> Iterator[Any]:
    for node in jax.tree.leaves(tree, is_leaf=_is_counting):
        if _is_counting(node):
            yield node
            if isinstance(node, _INJECTED):
                yield from _counting_nodes(node.inner_state)


def _is_counting(node: Any) -> bool:
    return isinstance(node, _COUNTING)


def _is_module(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Pytree)  # split and merged on its own, it would not share any more


def _fresh_states(optimizer: Optimizer, variables: Any) -> Iterator[Any]:
    init = getattr(optimizer, "init", None)
    if init is None:
        yield optimizer(variables)
        return
    if isinstance(variables, Mapping) and "params" in variables:
        yield init(variables["params"])
    yield init(jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else None, variables))


def _like(state: Any) -> Callable[[Any], bool]:
    structure: Any = jax.tree.structure(state)
    shapes = _shapes(state)
    return lambda node: structure == jax.tree.structure(node) and shapes == _shapes(node)


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _carried_over(fresh: Any, old: Any) -> Any:
    carried = _carried(fresh, old)
    if not _is_module(fresh):
        return carried
    nnx = sys.modules["flax.nnx"]
    nnx.update(fresh, nnx.state(carried))  # in place: it may refer to the very model that it was made for
    return fresh


def _carried(fresh: Any, old: Any) -> Any:
    """Return the new state with the old one's counts and rates, on the old one's devices."""

    def carry(new: Any, before: Any) -> Any:
        if isinstance(new, optax.ScaleByScheduleState):
            return before
        if isinstance(new, _INJECTED):
            return before._replace(inner_state=_carried(new.inner_state, before.inner_state))
        if isinstance(new, optax.MultiStepsState):
            others = {name: _carried(getattr(new, name), getattr(before, name)) for name in new._fields}
            return new._replace(**{**others, "gradient_step": before.gradient_step})
        return jax.device_put(new, before.sharding) if isinstance(before, jax.Array) and before.committed else new

    return jax.tree.map(carry, fresh, old, is_leaf=_is_counting)
