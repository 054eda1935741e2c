"""From a model's outputs to probabilities: what its loss and its last layer tell, and what its outputs are."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import losses, ops
from numpy.typing import NDArray

from snapcore import DataError

Activation = Callable[[Any], Any]
Check = Callable[[NDArray[Any]], None]
"""Refuses outputs that are not what was supposed."""


def _softmax(outputs: Any) -> Any:
    return ops.softmax(outputs, axis=-1)


ACTIVATIONS: dict[str, Activation] = {
    "softmax": _softmax,
    "sigmoid": ops.sigmoid,
    "identity": lambda outputs: outputs,
}

_PROBABILITIES = ("softmax", "sigmoid")
_BINARY = (losses.BinaryCrossentropy, losses.BinaryFocalCrossentropy)
_BINARY_FUNCTIONS = (losses.binary_crossentropy, losses.binary_focal_crossentropy)
_ROUNDING = 1e-3
_ROUNDING_HALF = 2e-2


def resolved(activation: str | Activation, model: Any, *, whole: bool = True) -> tuple[str | Activation, Check | None]:
    """Return which activation to use, and a check of the first batch's outputs, if there is something to check.

    Arguments:
        activation: a name, a callable, or `"auto"`: the compiled loss decides by its `from_logits`, without one the
            last layer, and without either it is softmax.
        model: built.
        whole: whether its outputs are taken as they are, not picked from.

    Raises:
        DataError: no such activation, or one that the model has applied already.
    """
    if activation == "auto":
        return _from_loss(model) or _from_last_layer(model, whole)
    if not isinstance(activation, str):
        return activation, None
    if activation not in ACTIVATIONS:
        raise DataError(f"activation must be one of {sorted([*ACTIVATIONS, 'auto'])} or a callable, got {activation!r}")
    if activation in _PROBABILITIES and whole and (last := ends_in(model)):
        raise DataError(
            f"the model ends in {last}: its outputs already are probabilities, and {activation} of them would be "
            "wrong: pass activation='identity' or 'auto'"
        )
    return activation, _refuse_probabilities if activation == "softmax" else None


def ends_in(model: Any) -> str | None:
    """Return "softmax" or "sigmoid" if a functional or sequential model ends in it, else None."""
    if len(getattr(model, "outputs", None) or ()) != 1:
        return None
    last: Any = (getattr(model, "operations", None) or model.layers)[-1]
    if isinstance(last, keras.layers.TimeDistributed):
        last = last.layer
    if isinstance(last, keras.Model):
        return ends_in(last)
    told = getattr(last, "activation", last)
    name = getattr(told, "__name__", type(told).__name__).lower()
    return name if name in _PROBABILITIES else None


def _from_loss(model: Any) -> tuple[str, Check | None] | None:
    """Return what the compiled loss tells; None if there is none, or its parts disagree."""
    given = getattr(model, "loss", None) if getattr(model, "compiled", False) else None
    told = {_told(loss) for loss in _parts(given) if loss is not None}
    if len(told) != 1 or None in told:
        return None
    (activation,) = told
    return str(activation), {"identity": _refuse_others, "softmax": _refuse_probabilities}.get(str(activation))


def _from_last_layer(model: Any, whole: bool) -> tuple[str, Check | None]:
    return ("identity", None) if whole and ends_in(model) else ("softmax", _refuse_probabilities)


def _parts(loss: Any) -> list[Any]:
    if isinstance(loss, dict) and "class_name" not in loss:
        return list(loss.values())
    return list(loss) if isinstance(loss, list | tuple) else [loss]


def _told(given: Any) -> str | None:
    loss = losses.get(given)
    from_logits = getattr(loss, "from_logits", None)
    if from_logits is None and inspect.isfunction(loss):
        default = inspect.signature(loss).parameters.get("from_logits")
        from_logits = default.default if default else None
    if from_logits is None:
        return None
    if not from_logits:
        return "identity"
    if isinstance(loss, _BINARY) or loss in _BINARY_FUNCTIONS:
        return "sigmoid"
    if getattr(loss, "axis", -1) != -1:
        raise DataError(
            f"the loss has the classes along axis {loss.axis}, and 'auto' takes them along the last: pass "
            f"activation=lambda outputs: keras.ops.softmax(outputs, axis={loss.axis})"
        )
    return "softmax"


def _refuse_probabilities(outputs: NDArray[Any]) -> None:
    rounding = _rounding(outputs)
    if rounding is None or outputs.ndim == 0:
        return
    sums = outputs.astype(np.float64).sum(-1)
    if (outputs >= 0).all() and (np.abs(sums - 1) < rounding).all():
        raise DataError(
            "the model's outputs already are probabilities (none below 0, rows that sum to 1), and softmax of them "
            "would be wrong: pass activation='identity'"
        )


def _refuse_others(outputs: NDArray[Any]) -> None:
    rounding = _rounding(outputs)
    if rounding is not None and not ((outputs >= 0).all() and (outputs <= 1 + rounding).all()):
        raise DataError(
            "the compiled loss takes the model's outputs for probabilities (from_logits=False), but some are below 0 "
            "or above 1: compile with from_logits=True if they are logits, or pass activation="
        )


def _rounding(outputs: NDArray[Any]) -> float | None:
    """Return what a sum of outputs may be off by; None if they are no floating numbers."""
    if outputs.dtype.name in ("bfloat16", "float16"):
        return _ROUNDING_HALF
    return _ROUNDING if np.issubdtype(outputs.dtype, np.floating) else None
