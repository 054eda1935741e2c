"""Which of a member's arrays is which of a model's weights, whoever wrote it.

Keras' own loops name weights by position. A loop in PyTorch over a model of Keras names them by PyTorch's `state_dict`,
which holds Keras' paths; one in JAX by where its tree has them, a tree of lists in the order of Keras' own.
"""

import re
from collections.abc import Iterable
from itertools import chain, permutations
from typing import Any

from numpy.typing import NDArray

from snapcore import DataError
from snapcore.store import Tensors
from snapcore_keras.state import fitted, named_weights

_OWN = re.compile(r"\d{3,}/.+")
_TORCH = "_torch_params."
_SEED = "seed_generator_state"  # of random layers, which are no weights
_CURE = "assign them by model.set_weights, and average predictions with snapcore.ensemble.combine"


def fitted_weights(model: Any, tensors: Tensors, what: str) -> list[NDArray[Any]]:
    """Return a member's arrays in the order of `model.weights`.

    Arguments:
        model: built.
        tensors: of a member by name.
        what: how to call them in an error.

    Raises:
        DataError: they are not what the model holds, or more than one order fits.
    """
    own = named_weights(model)
    if all(_OWN.fullmatch(name) for name in tensors):
        return fitted(own, tensors, what)
    by_path = {name.rpartition(_TORCH)[2]: array for name, array in tensors.items() if not name.endswith(_SEED)}
    # Keras numbers its layers through the whole process: their order is the same in each, their numbers are not.
    paths, given = sorted((weight.path for weight in model.weights), key=_order), sorted(by_path, key=_order)
    if [_order(path)[0] for path in paths] == [_order(path)[0] for path in given]:
        found = dict(zip(paths, given, strict=True))
        arrays = [by_path[found[weight.path]] for weight in model.weights]
    else:
        arrays = _by_position(model, tensors, what)
    if _shapes(arrays) != _shapes(model.weights):
        raise DataError(f"{what} was written by another loop, and does not fit the weights of {model.name}: {_CURE}")
    return arrays


def _order(path: str) -> tuple[str, list[int]]:
    """Return a path without Keras' numbers, and these, for each of its parts."""
    parts = [re.fullmatch(r"(.*?)(?:_(\d+))?", part, re.DOTALL) for part in path.split("/")]
    return "/".join(part[1] for part in parts if part), [int(part[2] or 0) for part in parts if part]


def _by_position(model: Any, tensors: Tensors, what: str) -> list[NDArray[Any]]:
    lists: dict[str, list[str]] = {}
    for name in sorted(tensors, key=lambda name: [part.zfill(9) for part in name.split("/")]):
        lists.setdefault(name.rpartition("/")[0], []).append(name)
    given = [_shapes(tensors[name] for name in names) for names in lists.values()]
    layouts = (
        [model.weights],
        [model.variables],
        [model.trainable_weights, model.non_trainable_weights],
        [model.trainable_variables, model.non_trainable_variables],
    )
    found = set()
    for layout in layouts:
        for order in permutations([part for part in layout if part]):
            if [_shapes(part) for part in order] == given:
                names = dict(zip((id(each) for part in order for each in part), chain(*lists.values()), strict=True))
                found.add(tuple(names[id(weight)] for weight in model.weights))
    if len(found) != 1:
        how = "in more than one order" if found else "in no order of Keras' lists"
        raise DataError(f"{what} was written by another loop, and fits {model.name} {how}: {_CURE}")
    return [tensors[name] for name in found.pop()]


def _shapes(arrays: Iterable[Any]) -> list[tuple[int, ...]]:
    return [tuple(array.shape) for array in arrays]
