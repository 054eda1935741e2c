"""A tree's arrays on their way to the host, and all that training needs to resume."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from snapcore import DataError
from snapcore.run import WEIGHTS
from snapcore.store import Tensors
from snapcore_jax.distributed import whole
from snapcore_jax.trees import is_key, named_leaves, named_parts, with_leaves, with_parts

__all__ = [
    "Copy",
    "dump_extras",
    "dump_training",
    "load_extras",
    "load_training",
    "named_leaves",
    "sums",
    "with_leaves",
    "with_parts",
]

REST = "rest/"
"""What the names of everything but the weights begin with in a resume point: moments, counts, random keys."""

_RANDOM = REST + "random/"  # the random keys inside the weights' own tree
_OTHERS = REST + "state/"


class Copy:
    """A copy of named arrays on their own devices, on its way to the host.

    It is made before this returns the hand to the loop, so that the next update may be given (donated) the originals.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = _duplicated({name: _local(value) for name, value in tensors.items()})
        for value in self._tensors.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()

    def resolve(self) -> dict[str, NDArray[Any]]:
        """Return the copy as host arrays that own their memory; bfloat16 as ml_dtypes' own, keys as their data."""
        arrays = {name: np.asarray(value) for name, value in self._tensors.items()}
        return {name: array if array.flags.owndata else array.copy() for name, array in arrays.items()}


def dump_training(variables: Any, rest: Any = ()) -> Copy:
    """Return a copy of all that training needs to resume, as `load_training` takes it.

    Arguments:
        variables: whose arrays, but for random keys, become the members.
        rest: optimizer state, keys, anything else.
    """
    own, others = named_parts(variables, rest)
    weights = named_leaves(variables, random=False)
    keys = {name: value for name, value in own.items() if name not in weights}
    return Copy(_prefixed(WEIGHTS, weights) | _prefixed(_RANDOM, keys) | _prefixed(_OTHERS, others))


def load_training(variables: Any, rest: Any, tensors: Tensors, what: str = "the resume point") -> tuple[Any, Any]:
    """Return variables and rest like those given, with what `dump_training` copied; references stay shared.

    Raises:
        DataError: names or shapes are not those of `variables` and `rest`.
    """
    saved = _part(tensors, WEIGHTS) | _part(tensors, _RANDOM)
    new_variables, new_rest = with_parts((variables, rest), (saved, _part(tensors, _OTHERS)), what)
    return new_variables, new_rest


def sums(variables: Any) -> dict[str, float]:
    """Return the sum of each array of floating-point weights by name: which shows that it has changed."""
    arrays = {
        name: value
        for name, value in named_leaves(variables, random=False).items()
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize > 1
    }
    summed = Copy(dict(zip(arrays, _sums(list(arrays.values())), strict=True))).resolve()
    return {name: float(value) for name, value in summed.items()}


def dump_extras(extras: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of objects as plain JSON; those of `get_state` may be bytes.

    Raises:
        DataError: one has no state that can be saved, or holds something that could only be pickled.
    """
    states: dict[str, Any] = {}
    for name, each in extras.items():
        get = getattr(each, "state_dict", None) or getattr(each, "get_state", None)
        state = None if get is None else get()
        states[name] = {"hex": state.hex()} if isinstance(state, bytes) else {"plain": state}
        try:
            json.dumps(states[name], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"the state of {name!r} in state= must be plain JSON or bytes: {error}") from error
        if get is None:
            raise DataError(
                f"{name!r} in state= is {type(each).__name__}, without state_dict or get_state: leave it out"
            )
    return states


def load_extras(extras: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Give objects back the states that `dump_extras` returned.

    Raises:
        DataError: others were saved.
    """
    if extras.keys() != states.keys():
        raise DataError(f"state= was {sorted(states)} when the run was saved, got {sorted(extras)}: pass the same")
    for name, each in extras.items():
        state = states[name]
        set_state = getattr(each, "load_state_dict", None) or each.set_state
        set_state(bytes.fromhex(state["hex"]) if "hex" in state else state["plain"])


def _local(value: Any) -> Any:
    if not isinstance(value, jax.Array):
        return np.array(value)
    data = jax.random.key_data(value) if is_key(value) else value
    if data.is_fully_replicated:
        return data.addressable_data(0)  # one of many equal copies will do
    return data if data.is_fully_addressable else whole(data)


def _duplicated(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copy what lies on the same devices in one call; two in one call would be moved together."""
    together: dict[Any, list[str]] = {}
    for name, value in tensors.items():
        if isinstance(value, jax.Array):
            together.setdefault(frozenset(value.devices()), []).append(name)
    copies = {
        name: copied
        for names in together.values()
        for name, copied in zip(names, _copies([tensors[name] for name in names]), strict=True)
    }
    return {name: copies.get(name, value) for name, value in tensors.items()}


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(array) for array in arrays]


@jax.jit
def _copies(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]


def _prefixed(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in named.items()}


def _part(tensors: Tensors, prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
