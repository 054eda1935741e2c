"""The count of updates that an optimizer keeps itself, and a reset of its moments that leaves the count alone."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import optax.contrib
from numpy.typing import NDArray

from snapcore import ProtocolError

Optimizer = Any
"""An `optax.GradientTransformation`, or a function from variables to a new optimizer state."""

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_COUNTING = (optax.MultiStepsState, optax.ScaleByScheduleState, *_INJECTED)
_COUNTS = ("count", "step_count", "step")
_NO_COUNT = (optax.contrib.ReduceLROnPlateauState,)  # its count begins anew again and again
_MOMENTS = {"mu", "nu", "trace", "acc_grads", "sum_of_squares", "exp_avg", "exp_avg_sq", "m1", "m2", "z", "params0"}


def read_count(rest: Any) -> int | None:
    """Return how many updates the optimizer has done, by its own count; None if it keeps none.

    That is the count by which schedules are evaluated, and with `optax.MultiSteps` its gradient steps. The count of
    Adam and its like is another: it belongs to the moments. Reading waits for the update that is being done.

    Arguments:
        rest: any tree with an optimizer's state in it.

    Raises:
        ProtocolError: there are several counts that differ, such as those of a generator and its critic.
    """
    counts = {number(array) for node in _counting_nodes(rest) for array in _arrays(_count(node))}
    if len(counts) > 1:
        raise ProtocolError(
            f"the optimizers in `rest` have counted {sorted(counts)} updates: pass count=, a function from rest to the "
            "count of this run's, or count=None to count calls of run.step"
        )
    return next(iter(counts), None)


def number(count: Any) -> int:
    """Return a count as an integer; one that is replicated over devices, as `pmap` does, is read once.

    Raises:
        ProtocolError: it has several values, or is no integer.
    """
    values = np.unique(_on_host(count))
    if values.size != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ProtocolError(
            f"the count of updates must be one integer, got {values.tolist()[:5]}: pass count=, a function from rest "
            "to it, or count=None to count calls of run.step"
        )
    return int(values[0])


def read_other_counts(rest: Any) -> list[int]:
    """Return the counts that optimizers keep for themselves, such as those of Adam, Prodigy or schedule-free ones."""
    states = jax.tree.leaves(rest, is_leaf=_counts_itself)
    return [number(state._asdict()[name]) for state in states if _counts_itself(state) for name in _own_names(state)]


def follows_schedule(rest: Any) -> bool:
    """Return whether an optimizer in `rest` has a schedule that is no hyperparameter of `optax.inject_hyperparams`."""
    nodes = jax.tree.leaves(rest, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    return any(isinstance(node, optax.ScaleByScheduleState) for node in nodes)


def injected_rates(rest: Any) -> list[tuple[float, float]]:
    """Return the rates that `optax.inject_hyperparams` has used last, each with its type's relative rounding."""
    rates = [node.hyperparams["learning_rate"] for node in _injected(rest) if "learning_rate" in node.hyperparams]
    return [
        (float(value), float(ml_dtypes.finfo(array.dtype).eps))  # type: ignore[no-untyped-call]
        for rate in rates
        for array in _arrays(rate)
        for value in np.unique(_on_host(array))
    ]


def injected_settings(rest: Any) -> dict[str, float]:
    """Return the numbers that `optax.inject_hyperparams` holds, but for rates."""
    return {
        name: float(f"{float(np.unique(_on_host(array))[0]):.6g}")  # as it was written, and not as float32 rounds it
        for node in _injected(rest)
        for name, value in node.hyperparams.items()
        if name != "learning_rate"
        for array in _arrays(value)
    }


def optimizer_name(rest: Any) -> str:
    """Return what the optimizer is made of: the classes of the states that optax keeps, joined; or nothing."""
    names: list[str] = []

    def visit(tree: Any) -> None:
        for node in jax.tree.leaves(tree, is_leaf=lambda each: each is not tree and _is_optax(each)):
            if _is_optax(node) and node._fields:  # without fields it stands for nothing, or for what is masked
                names.append(type(node).__name__)
                visit(node)

    visit([rest])
    return " ".join(names)


def refuse_strangers(variables: Any, rest: Any) -> None:
    """Raise `ProtocolError` if there are moments in `rest` that no weights have the shapes of.

    Arguments:
        variables: what is trained.
        rest: where the optimizer's state is; it may hold other weights too, with moments of their own.
    """
    states = [node for node in jax.tree.leaves(rest, is_leaf=_has_moments) if _has_moments(node)]
    others = [node for node in jax.tree.leaves(rest, is_leaf=_has_moments) if not _has_moments(node)]
    known = Counter(_shapes((variables, others)))
    for state in states:
        for name in _MOMENTS & set(state._fields):
            shapes = _shapes(getattr(state, name))
            flattened = len(shapes) == 1 and len(shapes[0]) == 1  # `optax.flatten` keeps all in one row
            strangers = Counter(shapes) - known
            if strangers and not flattened:
                raise ProtocolError(
                    f"`variables` and `rest` do not belong together: {type(state).__name__}.{name} has an array of "
                    f"shape {next(iter(strangers))}, and no weights do: pass the state of tx.init(these weights)"
                )


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


def _counting_nodes(tree: Any) -> Iterator[Any]:
    """Yield the states that count updates; of one inside another only that of `MultiSteps`, which knows more."""
    for node in jax.tree.leaves(tree, is_leaf=_is_counting):
        if isinstance(node, _INJECTED):
            inner = list(_counting_nodes(node.inner_state))
            yield from inner if any(isinstance(each, optax.MultiStepsState) for each in inner) else [node, *inner]
        elif _is_counting(node):
            yield node


def _count(node: Any) -> Any:
    return node.gradient_step if isinstance(node, optax.MultiStepsState) else node.count


def _arrays(count: Any) -> list[Any]:
    return jax.tree.leaves(count)  # Flax wraps a count in a variable


def _on_host(value: Any) -> NDArray[Any]:
    if isinstance(value, jax.Array):
        copied = jnp.copy(value)  # what the host has seen is not donated
        return np.asarray(copied if copied.is_fully_addressable else copied.addressable_data(0))
    return np.asarray(value)


def _injected(tree: Any) -> Iterator[Any]:
    for node in jax.tree.leaves(tree, is_leaf=lambda each: isinstance(each, _INJECTED)):
        if isinstance(node, _INJECTED):
            yield node
            yield from _injected(node.inner_state)


def _own_names(state: Any) -> list[str]:
    names = _COUNTS if _is_optax(state) else _COUNTS[:2]  # a `step` of the loop's own may be anything
    return [name for name in names if name in state._fields]


def _counts_itself(node: Any) -> bool:
    named = isinstance(node, tuple) and hasattr(node, "_fields")
    return named and not isinstance(node, _NO_COUNT) and bool(_own_names(node))


def _has_moments(node: Any) -> bool:
    return _is_optax(node) and not _MOMENTS.isdisjoint(node._fields)


def _is_optax(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields") and type(node).__module__.startswith("optax.")


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
