"""What a model returns, checked before it is averaged: outputs that an average would spoil in silence are refused.

The checks only compare and add up, so the arrays may be NumPy's, PyTorch's or JAX', wherever they lie.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError

ACTIVATIONS = ("softmax", "sigmoid", "identity", "gaussian")
"""The names that every adapter has a function for."""

Output = str | int | Callable[[Any], Any]
"""Which of the things that a model returns is averaged: a key or attribute, a position, or a function."""

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


def pick(returned: Any, output: Output | None, is_array: Callable[[Any], bool]) -> Any:
    """Return the array among the things that a model returned.

    Args:
        returned: by the model.
        output: a key or attribute, a position, or a function; None takes `returned` itself.
        is_array: whether something is one of the framework's arrays.

    Raises:
        DataError: it is no array, or there is no such key, attribute or position.

    Example:
        >>> pick({"logits": np.zeros(2), "hidden": np.ones(3)}, "logits", lambda value: isinstance(value, np.ndarray))
        array([0., 0.])
    """
    kind = type(returned).__name__
    if output is None:
        if is_array(returned):
            return returned
        cure = "output=, the name of the tensor's attribute or a function that picks it"
        if isinstance(returned, Mapping) and returned:
            keys = list(returned)
            cure = f"output={'logits' if 'logits' in keys else keys[0]!r}, or another of its keys {keys}"
        elif isinstance(returned, tuple | list) and returned:
            cure = f"output=0, or another position in 0..{len(returned) - 1}"
        raise DataError(f"the model must return one tensor, got {kind}: pass {cure}")
    if callable(output):
        picked = output(returned)
    else:
        try:
            by_name = isinstance(output, str) and not isinstance(returned, Mapping)
            picked = getattr(returned, str(output)) if by_name else returned[output]
        except (AttributeError, LookupError, TypeError) as error:
            has = f" with keys {list(returned)}" if isinstance(returned, Mapping) else ""
            raise DataError(f"output={output!r} must be in what the model returns, which is {kind}{has}") from error
    if not is_array(picked):
        raise DataError(f"output= must pick one tensor of what the model returns, got {type(picked).__name__}")
    return picked


def softmax_axis(shape: Sequence[int | None], axis: int | None, *, classes_last: bool = True) -> int:
    """Return the axis of a model's outputs that softmax is to be taken over.

    Args:
        shape: of the outputs, the batch first.
        axis: what the user passed; None means the last, where that is the only possibility.
        classes_last: whether the classes are the last axis of whatever outputs by convention. PyTorch has them first
            after the batch in images, and last in text.

    Raises:
        DataError: there is no such axis or only one output, or the user has to say which axis it is.

    Example:
        >>> softmax_axis((32, 10), None), softmax_axis((32, 21, 64, 64), 1)
        (-1, 1)
    """
    found, size = tuple(shape), len(shape)
    if axis is None and size < 2:
        raise DataError(
            f"softmax needs outputs [batch, classes], got shape {found}: pass activation='sigmoid' for one logit an "
            "example, or axis=0 for the classes of one example"
        )
    if axis is None and size > 2 and not classes_last:
        raise DataError(
            f"the classes of outputs of shape {found} may be its axis 1 or its last: pass axis=1 or axis=-1"
        )
    if axis is not None and not -size <= axis < size:
        raise DataError(f"axis must be in {-size}..{size - 1} for outputs of shape {found}, got {axis}")
    axis = -1 if axis is None else axis
    refuse_one_output([found[axis]])
    return axis


def check_pairs(shape: Sequence[int | None]) -> None:
    """Check that a model's outputs are as many ln variances as means.

    Args:
        shape: of the outputs, [..., 2 · values].

    Raises:
        DataError: their number is odd.
    """
    length = shape[-1] if len(shape) else None
    if length is None or length % 2:
        raise DataError(
            f"activation='gaussian' needs outputs [..., 2 · values], means and then ln variances, got shape "
            f"{tuple(shape)}: have the model give both"
        )


def refuse_one_output(shape: Sequence[int | None]) -> None:
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


def refuse_probabilities(outputs: npt.NDArray[Any], axis: int = -1) -> None:
    """Refuse outputs that softmax over an axis would make nonsense of.

    Args:
        outputs: of one batch, on the host. If they are no floats, or empty, only the shape counts.
        axis: of the classes.

    Raises:
        DataError: they already are probabilities, or there is one output.

    Example:
        >>> refuse_probabilities(np.array([[2.0, -1.0]]))
        >>> refuse_probabilities(np.array([[0.25, 0.75]]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        snapcore.errors.DataError: the model's outputs already are probabilities (none below 0, rows that sum to 1)...
    """
    if outputs.shape:
        refuse_one_output([outputs.shape[axis]])
    half = outputs.dtype.name in _HALF
    if not (half or np.issubdtype(outputs.dtype, np.floating)):
        return
    if are_probabilities(outputs.astype(np.float64), axis, half=half):
        raise DataError(ALREADY_PROBABILITIES)


def are_probabilities(outputs: Any, axis: int = -1, *, half: bool = False) -> Any:
    """Return whether no output is below 0, and all rows sum to 1 up to rounding.

    Args:
        outputs: in float32 or float64.
        axis: of the classes.
        half: whether they were computed in half precision, and rows may be 0.02 off instead of 0.001.

    Returns:
        One bool of the arrays' own kind; False where there are no outputs.

    Example:
        >>> bool(are_probabilities(np.array([[0.25, 0.75]])))
        True
    """
    if len(outputs.shape) == 0 or math.prod(outputs.shape) == 0:
        return False
    off = abs(outputs.sum(axis) - 1)
    return (outputs >= 0).all() & (off < (_ROUNDING_HALF if half else _ROUNDING)).all()


def refuse_equal_members(outputs: Iterable[Any], weights: Callable[[], Sequence[Iterable[Any]]], cure: str) -> bool:
    """Refuse members that all return the same, bit for bit, though their weights differ: other weights are run.

    Outputs that are all alike, or zeros and ones alone, decide nothing: zeros through a model without biases give the
    same whatever the weights are, and a softmax may be saturated.

    Args:
        outputs: of each member for one batch. Read until one differs from the first, so it may compute them on demand.
        weights: returns each member's arrays, in one order. Called only where all outputs are equal.
        cure: what the user can do about it.

    Returns:
        Whether that was decided.

    Raises:
        DataError: the outputs are equal and the weights are not.

    Example:
        >>> weights = [[np.ones(2)], [np.zeros(2)]]
        >>> refuse_equal_members([np.array([0.4, 0.6]), np.array([0.3, 0.7])], lambda: weights, "")
        True
        >>> refuse_equal_members([np.array([0.4, 0.6])] * 2, lambda: weights, "load them again")
        Traceback (most recent call last):
        ...
        snapcore.errors.DataError: the members' weights differ, yet their outputs are bit-equal: load them again
    """
    first, is_alone = None, True
    for each in outputs:
        if first is None:
            first = each
        elif _same(first, each):
            is_alone = False
        else:
            return True
    if first is None or is_alone or "float" not in str(first.dtype):
        return True
    values = first.reshape(-1)
    if not len(values) or not bool(((values != 0) & (values != 1)).any()):
        return False
    if bool((values == values[0]).all()) and (len(values) > 1 or bool(values[0] == 0.5)):
        return False
    own, *others = map(list, weights())
    if not all(len(own) == len(other) and all(map(_same, own, other)) for other in others):
        raise DataError(f"the members' weights differ, yet their outputs are bit-equal: {cure}")
    return True


def predict(run: Callable[[Any], npt.NDArray[Any]], batches: Iterable[Any]) -> npt.NDArray[Any]:
    """Run batch after batch, and return what comes out as one array.

    Args:
        run: from a batch of inputs to an array on the host, the batch first.
        batches: inputs x, or tuples or lists that begin with them, such as (x, y) of a loader: what follows is not
            used. Read once.

    Raises:
        DataError: there is no batch.

    Example:
        >>> predict(lambda x: 2 * x, [(np.array([1, 2]), "labels"), (np.array([3]), "more")])
        array([2, 4, 6])
    """
    found = [run(batch[0] if isinstance(batch, tuple | list) else batch) for batch in batches]
    if not found:
        raise DataError("predict needs at least one batch, got none; was the iterator used up before?")
    return np.concatenate(found)


def reason(error: BaseException) -> str:
    """Return what another library's error says, as a part of one line of our own."""
    return textwrap.shorten(str(error) or type(error).__name__, 120, placeholder=" …")


def _same(one: Any, two: Any) -> bool:
    return one.shape == two.shape and bool((one == two).all())
