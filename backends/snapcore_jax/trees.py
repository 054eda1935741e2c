"""A tree's arrays by name, and the way back.

A tree is anything that JAX takes: dictionaries, tuples, registered dataclasses, Flax NNX modules and states, Linen
variables, Equinox modules. A name is the path to the array, its parts joined by `/`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten
from numpy.typing import NDArray

from snapcore import DataError
from snapcore.store import Tensors, check_fit

_Path = tuple[Any, ...]
_NUMBERS = (bool, int, float, complex, np.generic)
_STATIC = (*_NUMBERS, str, bytes, np.dtype)  # what an Equinox module may hold beside arrays and functions


def named_leaves(tree: Any, *, random: bool = True) -> dict[str, Any]:
    """Return the tree's arrays by name, not copied.

    The names of an NNX module, of its state and of the pure dictionary of that are the same. What an Equinox module
    holds beside arrays is left out.

    Arguments:
        tree: the arrays may be JAX's, NumPy's, plain numbers, or `jax.ShapeDtypeStruct`.
        random: whether random keys (typed keys, and NNX's `RngKey` and `RngCount`) are among them.

    Raises:
        DataError: a leaf is no array, or two have the same name; the message says where.

    Example:
        >>> list(named_leaves({"dense": (np.zeros(2), np.ones(3))}))
        ['dense/0', 'dense/1']
    """
    named: dict[str, Any] = {}
    for leaf in _flatten(tree).leaves:
        name = _name(leaf.path)
        if name in named:
            raise DataError(f"two arrays are called {name!r}: a name is a path joined by '/', so use no '/' in a key")
        named[name] = leaf
    return {name: leaf.value for name, leaf in named.items() if random or not leaf.random}


def with_leaves(tree: Any, tensors: Tensors, what: str = "the member", *, random: bool = True) -> Any:
    """Return a tree like `tree` with named arrays for its own, of the same dtypes and shardings.

    Arguments:
        tree: what `named_leaves` takes; left alone. NNX modules are made anew.
        tensors: by name; copied.
        what: how to call the tensors in an error.
        random: whether random keys are put back too; if not, they must not be among the tensors.

    Raises:
        DataError: names or shapes are not the tree's.
    """
    wanted = named_leaves(tree, random=random)
    check_fit(
        {name: np.shape(array) for name, array in tensors.items()},
        {name: _shape(value) for name, value in wanted.items()},
        what,
    )
    flat = _flatten(tree)
    names = [(_name(leaf.path), leaf.value) for leaf in flat.leaves]
    values = [_like(value, tensors[name]) if name in wanted else value for name, value in names]
    jax.block_until_ready(values)  # JAX reads host memory later, and it is the caller's
    return flat.rebuild(iter(values))


class _Leaf(NamedTuple):
    path: _Path
    value: Any
    random: bool


class _Flat(NamedTuple):
    leaves: list[_Leaf]
    rebuild: Callable[[Iterator[Any]], Any]
    """Takes as many values as there are leaves, and makes the tree of them."""


def _flatten(tree: Any) -> _Flat:
    pairs, treedef = tree_flatten_with_path(tree, is_leaf=_is_object)
    parts = [_opened(path, value) for path, value in pairs]
    leaves = [leaf for part in parts for leaf in part.leaves]
    return _Flat(leaves, lambda values: tree_unflatten(treedef, [part.rebuild(values) for part in parts]))


def _opened(path: _Path, value: Any) -> _Flat:
    if _is(value, "flax.nnx", "Pytree"):
        return _opened_module(path, value)
    if _is(value, "flax.nnx", "Variable"):
        return _opened_variable(path, value)
    if _is(value, "equinox", "Module"):
        return _opened_equinox(path, value)
    if not _is_array(value) and not isinstance(value, _NUMBERS):
        raise DataError(_not_an_array(path, value, "keep only what is trained or counted in the tree"))
    return _Flat([_Leaf(path, value, random=is_key(value))], next)


def _opened_module(path: _Path, module: Any) -> _Flat:
    nnx = sys.modules["flax.nnx"]
    graph, state = nnx.split(module)  # a variable that two modules share is in the state once
    flat = _flatten(state)
    return _Flat(_under(path, flat.leaves), lambda values: nnx.merge(graph, flat.rebuild(values)))


def _opened_variable(path: _Path, variable: Any) -> _Flat:
    pairs, treedef = tree_flatten_with_path(variable)
    random = _is(variable, "flax.nnx", "RngState")
    # The first key is the variable's own attribute, which no name of Flax mentions.
    leaves = [_Leaf((*path, *inner[1:]), value, random or is_key(value)) for inner, value in pairs]
    return _Flat(leaves, lambda values: tree_unflatten(treedef, [next(values) for _ in leaves]))


def _opened_equinox(path: _Path, module: Any) -> _Flat:
    pairs, treedef = tree_flatten_with_path(module)
    for inner, value in pairs:
        if not (_is_array(value) or callable(value) or isinstance(value, _STATIC)):
            raise DataError(_not_an_array((*path, *inner), value, "make it a static field: eqx.field(static=True)"))
    leaves = [_Leaf((*path, *inner), value, is_key(value)) for inner, value in pairs if _is_array(value)]
    return _Flat(
        leaves,
        lambda values: tree_unflatten(treedef, [next(values) if _is_array(value) else value for _, value in pairs]),
    )


def _is_object(value: Any) -> bool:
    return _is(value, "flax.nnx", "Pytree") or _is(value, "flax.nnx", "Variable") or _is(value, "equinox", "Module")


def _is(value: Any, module: str, name: str) -> bool:
    """Tell whether a value is of a library's class; if it is, the library has been imported."""
    library = sys.modules.get(module)
    return library is not None and isinstance(value, getattr(library, name))


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def is_key(value: Any) -> bool:
    """Tell typed random keys; the older ones are arrays of uint32 like any other."""
    return jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key)


def _not_an_array(path: _Path, value: Any, cure: str) -> str:
    return f"a snapshot holds arrays, but {_name(path)!r} of the tree is {type(value).__name__}: {cure}"


def _name(path: _Path) -> str:
    return keystr(path, simple=True, separator="/") or "value"  # a tree that is one array


def _under(path: _Path, leaves: Iterable[_Leaf]) -> list[_Leaf]:
    return [leaf._replace(path=(*path, *leaf.path)) for leaf in leaves]


def _shape(value: Any) -> tuple[int, ...]:
    return jax.eval_shape(jax.random.key_data, value).shape if is_key(value) else np.shape(value)


def _like(own: Any, array: NDArray[Any]) -> Any:
    if not _is_array(own):
        return type(own)(array[()])
    if isinstance(own, np.ndarray):
        return np.array(array, own.dtype)
    if is_key(own):
        return _on_devices_of(own, jax.random.wrap_key_data(jnp.array(array), impl=_implementation(own)))
    return _on_devices_of(own, jnp.array(array, own.dtype))


def _on_devices_of(own: Any, value: jax.Array) -> jax.Array:
    committed = getattr(own, "committed", own.sharding is not None)  # an abstract array may name its devices
    return jax.device_put(value, own.sharding) if committed else value


def _implementation(key: Any) -> Any:
    found: list[Any] = []
    jax.eval_shape(lambda traced: found.append(jax.random.key_impl(traced)), key)  # an abstract key has it only there
    return found[0]
