"""What a model returns, checked before it is averaged: outputs that softmax would spoil are refused."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError

ACTIVATIONS = ("softmax", "sigmoid", "identity")
"""The names that every adapter has a function for."""

ALREADY_PROBABILITIES = (
    "the model's outputs already are probabilities (none below 0, rows that sum to 1), and softmax of them would be "
    "wrong: pass activation='identity'"
)
"""The error of a model that ends in softmax."""

_HALF = ("float16", "bfloat16")
_ROUNDING = 1e-3
_ROUNDING_HALF = 2e-2


def check_activation(activation: object, names: Iterable[str] = ACTIVATIONS) -> None:
    """Check that an activation is one of the names, or no name at all: a function of the user's.

    Raises:
        DataError: it is another name.
    """
    if isinstance(activation, str) and activation not in names:
        raise DataError(f"activation must be one of {sorted(names)} or a callable, got {activation!r}")


def refuse_probabilities(outputs: npt.NDArray[Any]) -> None:
    """Refuse outputs that softmax over the last axis would make nonsense of.

    Args:
        outputs: one batch of a model's, [..., classes], on the host. Of numbers that are no floats, and of none,
            only the shape is looked at.

    Raises:
        DataError: they already are probabilities, or there is one output.

    Example:
        >>> refuse_probabilities(np.array([[2.0, -1.0]]))
        >>> refuse_probabilities(np.array([[0.25, 0.75]]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        snapcore.errors.DataError: the model's outputs already are probabilities (none below 0, rows that sum to 1)...
    """
    refuse_one_output(outputs.shape)
    half = outputs.dtype.name in _HALF
    if not (half or np.issubdtype(outputs.dtype, np.floating)):
        return
    if are_probabilities(outputs.astype(np.float64), half=half):
        raise DataError(ALREADY_PROBABILITIES)


def refuse_one_output(shape: Sequence[int]) -> None:
    """Refuse softmax over a last axis of one, which gives 1 whatever the outputs are.

    Args:
        shape: of a model's outputs, [..., classes].

    Raises:
        DataError: there is one output.
    """
    if tuple(shape[-1:]) == (1,):
        raise DataError(
            "softmax over one output is 1 whatever it is: pass activation='sigmoid' if it is a logit of two classes, "
            "or 'identity'"
        )


def are_probabilities(outputs: Any, *, half: bool = False) -> Any:
    """Return whether no output is below 0, and all rows sum to 1 up to rounding.

    For arrays that are not on the host: it only compares and adds up, so they may be of PyTorch or JAX, and traced.

    Args:
        outputs: [..., classes], in float32 or float64.
        half: whether they were computed in half precision, and rows may be 0.02 off instead of 0.001.

    Returns:
        One bool of the arrays' own kind; False where there are no outputs.

    Example:
        >>> bool(are_probabilities(np.array([[0.25, 0.75]])))
        True
    """
    if len(outputs.shape) == 0 or math.prod(outputs.shape) == 0:
        return False
    off = abs(outputs.sum(-1) - 1)
    return (outputs >= 0).all() & (off < (_ROUNDING_HALF if half else _ROUNDING)).all()
