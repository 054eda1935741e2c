"""Named host arrays: whether they are finite, and whether they fit a model."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snapcore.errors import DataError, DivergedError

Array = NDArray[Any]
Tensors = Mapping[str, Array]


def check_finite(tensors: Tensors, what: str, *, constant: Collection[str] = frozenset()) -> None:
    """Raise `DivergedError` if a tensor has NaN or an infinity, naming it and `what` it is part of.

    Arguments:
        tensors: by name; those of integers or booleans are always finite.
        what: what the message calls them, such as `member 3`.
        constant: names that training does not change, such as a mask of -inf or a bound of +inf; see
            `non_finite`. They may hold anything.
    """
    for name, array in tensors.items():
        if name not in constant and not _is_finite(array):
            bad = int(np.count_nonzero(~np.isfinite(array)))
            raise DivergedError(
                f"{what} is refused: {bad} of {array.size} values of {name!r} are not finite. Lower the learning rate, "
                "clip gradients, or use a wider dtype"
            )


def non_finite(tensors: Tensors) -> frozenset[str]:
    """Return the names of the tensors that have NaN or an infinity.

    Example:
        >>> non_finite({"mask": np.array([0.0, -np.inf]), "weight": np.ones(2)})
        frozenset({'mask'})
    """
    return frozenset(name for name, array in tensors.items() if not _is_finite(array))


def _is_finite(array: Array) -> bool:
    # NumPy does not count the types of ml_dtypes among its inexact ones.
    inexact = np.issubdtype(array.dtype, np.inexact) or array.dtype.name == "bfloat16"
    return not inexact or bool(np.isfinite(array).all())


def check_fit(given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise `DataError` unless both have the same names and shapes; the message lists what differs.

    Arguments:
        given: name -> shape of the tensors to load.
        wanted: name -> shape in the model.
        what: what the message calls the tensors.
    """
    missing = [f"{name!r} {wanted[name]} is missing" for name in wanted if name not in given]
    extra = [f"{name!r} {given[name]} is not in the model" for name in given if name not in wanted]
    shapes = [
        f"{name!r} is {given[name]}, the model's is {wanted[name]}"
        for name in wanted
        if name in given and given[name] != wanted[name]
    ]
    if differences := missing + extra + shapes:
        shown = "; ".join(differences[:5]) + ("; …" if len(differences) > 5 else "")
        raise DataError(f"{what} does not fit the model ({len(differences)} differences): {shown}")
