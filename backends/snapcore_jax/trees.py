"""A tree's arrays by name, and the way back.

A tree is anything that JAX takes: dictionaries, tuples, registered dataclasses, Flax NNX modules and states, Linen
variables, Equinox modules. A name is the path to the array, its parts joined by `/`.

All NNX objects of several trees are split and merged together. They hold references: an optimizer that has its model,
or two towers with one embedding, must still share it afterwards. What is shared is named once, where it comes first.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
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
    return named_parts(tree, random=random)[0]


def named_parts(*trees: Any, random: bool = True) -> tuple[dict[str, Any], ...]:
    """Return the arrays by name of each of several trees; one that NNX objects share is in the first that has it.

    Raises:
        DataError: as `named_leaves`.
    """
    named: tuple[dict[str, _Leaf], ...] = tuple({} for _ in trees)
    for leaf in _flatten(trees).leaves:
        name = _name(leaf.path)
        if name in named[leaf.tree]:
            raise DataError(f"two arrays are called {name!r}: a name is a path joined by '/', so use no '/' in a key")
        named[leaf.tree][name] = leaf
    return tuple({name: leaf.value for name, leaf in part.items() if random or not leaf.random} for part in named)


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
    return with_parts((tree,), (tensors,), what, random=random)[0]


def with_parts(
    trees: tuple[Any, ...], tensors: Sequence[Tensors | None], what: str, *, random: bool = True
) -> tuple[Any, ...]:
    """Return trees like those given, each with named arrays for its own; what NNX objects share, they share again.

    Arguments:
        trees: left alone.
        tensors: of each tree, as `named_parts` names them; None keeps its arrays.
        what: as for `with_leaves`.
        random: as for `with_leaves`.

    Raises:
        DataError: names or shapes are not a tree's; nothing was made by then.
    """
    wanted = named_parts(*trees, random=random)
    for given, part in zip(tensors, wanted, strict=True):
        if given is not None:
            check_fit(
                {name: np.shape(array) for name, array in given.items()},
                {name: _shape(value) for name, value in part.items()},
                what,
            )
    flat, values = _flatten(trees), []
    for leaf in flat.leaves:
        name, given = _name(leaf.path), tensors[leaf.tree]
        replaced = given is not None and name in wanted[leaf.tree]
        values.append(_like(leaf.value, given[name]) if given is not None and replaced else leaf.value)
    jax.block_until_ready(values)  # JAX reads host memory later, and it is the caller's
    rebuilt: tuple[Any, ...] = flat.rebuild(iter(values))
    return rebuilt


class _Leaf(NamedTuple):
    tree: int
    """Which of several trees it is in."""
    path: _Path
    value: Any
    random: bool


class _Flat(NamedTuple):
    leaves: list[_Leaf]
    rebuild: Callable[[Iterator[Any]], Any]
    """Takes as many values as there are leaves, and makes the tree of them."""


def _flatten(trees: tuple[Any, ...]) -> _Flat:
    pairs, treedef = tree_flatten_with_path(
        trees, is_leaf=lambda value: _is_nnx(value) or _is(value, "equinox", "Module")
    )
    opened = [None if _is_nnx(value) else _opened(path, value) for path, value in pairs]
    shared = [(path, value) for path, value in pairs if _is_nnx(value)]
    together = _opened_together(shared) if shared else _Flat([], lambda _: [])
    leaves = [leaf for part in opened if part is not None for leaf in part.leaves]

    def rebuild(values: Iterator[Any]) -> Any:
        others = [None if part is None else part.rebuild(values) for part in opened]
        objects = iter(together.rebuild(values))
        return tree_unflatten(
            treedef, [next(objects) if part is None else other for part, other in zip(opened, others, strict=True)]
        )

    return _Flat([*leaves, *together.leaves], rebuild)


def _opened(path: _Path, value: Any) -> _Flat:
    if _is(value, "equinox", "Module"):
        return _opened_equinox(path, value)
    if not _is_array(value) and not isinstance(value, _NUMBERS):
        raise DataError(_not_an_array(path[1:], value, "keep only what is trained or counted in the tree"))
    return _Flat([_leaf(path, value, random=is_key(value))], next)


def _opened_together(objects: list[tuple[_Path, Any]]) -> _Flat:
    nnx = sys.modules["flax.nnx"]
    graph, state = nnx.split([value for _, value in objects])  # a variable that two share is in the state once
    pairs, treedef = tree_flatten_with_path(state, is_leaf=lambda value: _is(value, "flax.nnx", "Variable"))
    # An inner path begins with the object's index in the list; the outer path says where that is.
    paths = [(*objects[inner[0].key][0], *inner[1:]) for inner, _ in pairs]
    parts = [
        _opened_variable(path, value) if _is(value, "flax.nnx", "Variable") else _opened(path, value)
        for path, (_, value) in zip(paths, pairs, strict=True)
    ]
    leaves = [leaf for part in parts for leaf in part.leaves]
    return _Flat(
        leaves, lambda values: nnx.merge(graph, tree_unflatten(treedef, [part.rebuild(values) for part in parts]))
    )


def _opened_variable(path: _Path, variable: Any) -> _Flat:
    pairs, treedef = tree_flatten_with_path(variable)
    random = _is(variable, "flax.nnx", "RngState")
    # The first key is the variable's own attribute, which no name of Flax mentions.
    leaves = [_leaf((*path, *inner[1:]), value, random=random or is_key(value)) for inner, value in pairs]
    return _Flat(leaves, lambda values: tree_unflatten(treedef, [next(values) for _ in leaves]))


def _opened_equinox(path: _Path, module: Any) -> _Flat:
    pairs, treedef = tree_flatten_with_path(module)
    for inner, value in pairs:
        if not (_is_array(value) or callable(value) or isinstance(value, _STATIC)):
            raise DataError(_not_an_array((*path[1:], *inner), value, "make it a static field: eqx.field(static=True)"))
    leaves = [_leaf((*path, *inner), value, random=is_key(value)) for inner, value in pairs if _is_array(value)]
    return _Flat(
        leaves,
        lambda values: tree_unflatten(treedef, [next(values) if _is_array(value) else value for _, value in pairs]),
    )


def _leaf(path: _Path, value: Any, *, random: bool) -> _Leaf:
    return _Leaf(path[0].idx, path[1:], value, random)


def _is_nnx(value: Any) -> bool:
    return _is(value, "flax.nnx", "Pytree") or _is(value, "flax.nnx", "Variable")


def _is(value: Any, module: str, name: str) -> bool:
    """Tell whether a value is of a library's class; if it is, the library has been imported."""
    library = sys.modules.get(module)
    return library is not None and isinstance(value, getattr(library, name))


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def holds_module(tree: Any, *libraries: str) -> bool:
    """Return whether a tree is a module of Flax or Equinox, or holds one.

    Arguments:
        tree: anything.
        libraries: which of `flax.nnx`, `flax.linen` and `equinox`; default all.
    """
    kinds = [("flax.nnx", "Pytree"), ("flax.linen", "Module"), ("equinox", "Module")]

    def is_module(value: Any) -> bool:
        return any(_is(value, library, name) for library, name in kinds if library in (libraries or dict(kinds)))

    return any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module)))


def is_key(value: Any) -> bool:
    """Tell typed random keys; the older ones are arrays of uint32 like any other."""
    return jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key)


def _not_an_array(path: _Path, value: Any, cure: str) -> str:
    return f"a snapshot holds arrays, but {_name(path)!r} of the tree is {type(value).__name__}: {cure}"


def _name(path: _Path) -> str:
    return keystr(path, simple=True, separator="/") or "value"  # a tree that is one array


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
