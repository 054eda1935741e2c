"""Named host arrays: what may become a member, and what fits a model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snapcore.errors import DataError, DivergedError


def check_finite(tensors: Mapping[str, NDArray[Any]], what: str) -> None:
    """Raise `DivergedError` if a floating tensor holds NaN or +inf, naming it and `what` it was part of.

    -inf passes: causal masks are made of it, while weights that overflow bring NaN or +inf with them.
    """
    for name, array in tensors.items():
        if not np.issubdtype(array.dtype, np.inexact) and array.dtype.name != "bfloat16":
            continue
        if not np.isfinite(array).all():
            bad = int(np.count_nonzero(np.isnan(array) | np.isposinf(np.real(array)) | np.isposinf(np.imag(array))))
            if bad:
                raise DivergedError(
                    f"{what} is refused: {bad} of {array.size} values of {name!r} are not finite; the members taken "
                    "before are kept. Lower the learning rate, clip gradients, or train in a wider dtype"
                )


def check_fit(given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise `DataError` unless both have the same names and shapes, listing what differs.

    Arguments:
        given: name -> shape of the tensors at hand.
        wanted: name -> shape that the model has.
        what: how to call the tensors in the message.
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
