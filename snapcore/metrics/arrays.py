"""What a score is computed from, checked: refused where it is not what it must be, and never repaired."""

from typing import Any

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError

ROUNDING = 1e-5  # how far beyond 0 and 1 the arithmetic of float32 may carry an honest probability


def as_probabilities(values: npt.ArrayLike, subject: str) -> npt.NDArray[Any]:
    """Give `values` as an array of their own dtype, sure to be finite real numbers in 0..1.

    Args:
        values: anything NumPy makes a regular array of, of any shape.
        subject: what to call the values in a message.

    Returns:
        The same array where `values` was one; no copy, and nothing clipped.

    Raises:
        DataError: ragged, not real numbers, or some value outside 0..1 (by more than rounding).

    Example:
        >>> as_probabilities([0.25, 0.75], "probabilities")
        array([0.25, 0.75])
    """
    array = as_array(values, subject)
    if not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise DataError(f"{subject} must be real numbers, got dtype {array.dtype}")
    # min and max carry NaN along and need no array of their own
    if array.size and not (float(array.min()) >= -ROUNDING and float(array.max()) <= 1 + ROUNDING):
        exact = array.astype(np.float64)
        position = np.argwhere(~((exact >= -ROUNDING) & (exact <= 1 + ROUNDING)))[0]
        found = f"{exact[tuple(position)]:g} at {position.tolist()}"
        raise DataError(
            f"{subject} must be finite and in 0..1, got {found}; apply softmax first, or pass log=True for logarithms"
        )
    return array


def as_log_probabilities(values: npt.ArrayLike, subject: str) -> npt.NDArray[Any]:
    """Give `values` as an array of their own dtype, sure to be logarithms of probabilities: at most 0, or −inf.

    Args:
        values: anything NumPy makes a regular array of, of any shape.
        subject: what to call the values in a message.

    Returns:
        The same array where `values` was one; no copy, and nothing clipped.

    Raises:
        DataError: ragged, not real numbers, NaN, or some value above 0 (by more than rounding).

    Example:
        >>> as_log_probabilities([-1000.0, 0.0], "log-probabilities")
        array([-1000.,     0.])
    """
    array = as_array(values, subject)
    if not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise DataError(f"{subject} must be real numbers, got dtype {array.dtype}")
    if array.size and not float(array.max()) <= ROUNDING:  # max carries NaN along
        position = np.argwhere(~(array.astype(np.float64) <= ROUNDING))[0]
        raise DataError(
            f"{subject} must be at most 0 and not NaN, got {array[tuple(position)]:g} at {position.tolist()}; "
            "apply log_softmax first"
        )
    return array


def as_array(values: npt.ArrayLike, subject: str) -> npt.NDArray[Any]:
    """Give `values` as an array, or raise `DataError` that calls them `subject`."""
    try:
        return np.asarray(values)
    except ValueError as exc:
        raise DataError(f"{subject} must be a regular array of numbers: {exc}") from exc


def aligned(arrays: dict[str, npt.ArrayLike]) -> list[npt.NDArray[np.float64]]:
    """Return arrays in float64, sure to be finite and of one shape."""
    found = []
    for name, values in arrays.items():
        array = as_array(values, name)
        if not (array.dtype == bool or np.can_cast(array.dtype, np.float64, "same_kind")):
            raise DataError(f"{name} must be real numbers, got dtype {array.dtype}")
        found.append(array.astype(np.float64, copy=False))
        if not found[-1].size:
            raise DataError(f"at least one example is required, got shape {array.shape} for {name}")
        if array.shape != found[0].shape:
            raise DataError(f"{' and '.join(arrays)} must have one shape, got {array.shape} and {found[0].shape}")
        if not np.isfinite(found[-1]).all():
            position = np.argwhere(~np.isfinite(found[-1]))[0]
            raise DataError(f"{name} must be finite, got {array[tuple(position)]} at {position.tolist()}")
    return found
