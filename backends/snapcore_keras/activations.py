"""From a model's outputs to probabilities: which activation its loss, its last layer and its outputs call for."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import losses, ops
from numpy.typing import NDArray

from snapcore import DataError
from snapcore.ensemble import check_activation, refuse_probabilities

Activation = Callable[[Any], Any]
Check = Callable[[NDArray[Any]], None]
"""Refuses outputs that are not what was supposed."""


ACTIVATIONS: dict[str, Activation] = {
    "softmax": partial(ops.softmax, axis=-1),
    "sigmoid": ops.sigmoid,
    "identity": lambda outputs: outputs,
}

_PROBABILITIES = ("softmax", "sigmoid")
_BINARY = (losses.BinaryCrossentropy, losses.BinaryFocalCrossentropy)
_BINARY_FUNCTIONS = (losses.binary_crossentropy, losses.binary_focal_crossentropy)
_ROUNDING = 2e-2
"""What probabilities may be above 1, in half precision too; logits are by more."""


def resolved(activation: str | Activation, model: Any, *, whole: bool = True) -> tuple[str | Activation, Check | None]:
    """Return which activation to use, and a check of the first batch's outputs, if there is something to check.

    Arguments:
        activation: a name, a callable, or `"auto"`: the compiled loss decides by its `from_logits`, without one the
            last layer, and without either it is softmax.
        model: built.
        whole: whether its outputs are taken as they are, not picked from.

    Raises:
        DataError: no such activation.
    """
    if not isinstance(activation, str):
        return activation, None
    check_activation(activation, ["auto", *ACTIVATIONS])
    last = ends_in(model) if whole else None
    if activation != "auto":
        return activation, _check(activation, last)
    decided = _from_loss(model)
    if decided == "identity":
        return decided, _refuse_others
    name = decided or ("identity" if last else "softmax")
    return name, _check(name, last)


def ends_in(model: Any) -> str | None:
    """Return "softmax" or "sigmoid" if a functional or sequential model ends in it, else None."""
    if len(getattr(model, "outputs", None) or ()) != 1:
        return None
    last: Any = (getattr(model, "operations", None) or model.layers)[-1]
    if isinstance(last, keras.layers.TimeDistributed):
        last = last.layer
    if isinstance(last, keras.Model):
        return ends_in(last)
    ending = getattr(last, "activation", last)
    name = getattr(ending, "__name__", type(ending).__name__).lower()
    return name if name in _PROBABILITIES else None


def _check(activation: str, last: str | None) -> Check | None:
    if last and activation in _PROBABILITIES:
        return partial(_refuse_again, last=last, activation=activation)
    return refuse_probabilities if activation == "softmax" else None


def _from_loss(model: Any) -> str | None:
    """Return the activation that the compiled loss calls for; None if there is none, or its parts disagree."""
    given = getattr(model, "loss", None) if getattr(model, "compiled", False) else None
    if isinstance(given, dict) and "class_name" not in given:
        given = list(given.values())
    parts = given if isinstance(given, list | tuple) else [given]
    found = {_from_one_loss(loss) for loss in parts if loss is not None}
    return found.pop() if len(found) == 1 else None


def _from_one_loss(given: Any) -> str | None:
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
    axis = getattr(loss, "axis", -1)
    if axis != -1:
        raise DataError(
            f"the loss has the classes along axis {axis}, and 'auto' takes them along the last: pass "
            f"activation=lambda outputs: keras.ops.softmax(outputs, axis={axis})"
        )
    return "softmax"


def _refuse_again(outputs: NDArray[Any], *, last: str, activation: str) -> None:  # noqa: ARG001 - the layer decides
    raise DataError(
        f"the model ends in {last}: its outputs already are probabilities, and {activation} of them would be wrong: "
        "pass activation='identity'"
    )


def _refuse_others(outputs: NDArray[Any]) -> None:
    if not ((outputs >= 0).all() and (outputs <= 1 + _ROUNDING).all()):
        raise DataError(
            "the compiled loss takes the model's outputs for probabilities (from_logits=False), but some are below 0 "
            "or above 1: compile with from_logits=True if they are logits, or pass activation="
        )
