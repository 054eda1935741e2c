"""From a model's outputs to probabilities: which activation its loss, its last layer and its outputs call for."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import losses
from numpy.typing import NDArray

from snapcore import DataError
from snapcore.ensemble import ACTIVATIONS, Output, check_activation, check_pairs, refuse_probabilities, softmax_axis
from snapcore_keras.losses import GaussianNll

Activation = Callable[[Any], Any]
Check = Callable[[NDArray[Any]], None]
"""Refuses outputs that are not what was supposed."""


_PROBABILITIES = ("softmax", "sigmoid")
_BINARY = (losses.BinaryCrossentropy, losses.BinaryFocalCrossentropy)
_BINARY_FUNCTIONS = (losses.binary_crossentropy, losses.binary_focal_crossentropy)
_ROUNDING = 2e-2
"""What probabilities may be above 1, in half precision too; logits are by more."""


def resolved(
    activation: str | Activation, model: Any, axis: int | None, output: Output | None
) -> tuple[str | Activation, Check | None]:
    """Return which activation to use, and a check of the first batch's outputs, if there is something to check.

    Arguments:
        activation: a name, a callable, or `"auto"`: the compiled loss decides by its `from_logits`; one of Keras
            without that compares values. A loss of the user's leaves it to a last layer of softmax or sigmoid; and
            without a loss it is softmax, but for such a last layer.
        model: built.
        axis: of the classes, for softmax.
        output: picks the tensor when the model returns something else; and a list or dict of losses, the loss.

    Raises:
        DataError: no such activation, or nothing decides.
    """
    if not isinstance(activation, str):
        return activation, None
    check_activation(activation, ["auto", *ACTIVATIONS])
    last = ends_in(model) if output is None else None
    if activation != "auto":
        return activation, _check(activation, axis, last)
    given = _losses(model, output)
    found = {_from_loss(loss, axis) for loss in given}
    decided = found.pop() if len(found) == 1 else None
    if decided in ("probabilities", "values"):
        return "identity", _refuse_others if decided == "probabilities" else None
    if given and not (decided or last):
        names = [loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__) for loss in given]
        raise DataError(
            f"the compiled loss does not say what the outputs are, got {', '.join(names)}: pass activation='identity' "
            "for values or probabilities, 'softmax' or 'sigmoid' for logits"
        )
    name = decided or ("identity" if last else "softmax")
    return name, _check(name, axis, last)


def classes_last() -> bool:
    """Return whether Keras' convention is that the classes are the last axis of images too."""
    return bool(keras.config.image_data_format() == "channels_last")


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


def _check(activation: str, axis: int | None, last: str | None) -> Check | None:
    if last and activation in _PROBABILITIES:
        return partial(_refuse_again, last=last, activation=activation)
    if activation == "gaussian":
        return _check_pairs
    return partial(_refuse_probabilities, axis=axis) if activation == "softmax" else None


def _losses(model: Any, output: Output | None) -> list[Any]:
    """Return the compiled losses: that of the output alone, where it is named as the losses are."""
    given = getattr(model, "loss", None) if getattr(model, "compiled", False) else None
    if isinstance(given, dict) and "class_name" not in given:
        parts = [given[output]] if output in given else list(given.values())
    elif isinstance(given, list | tuple):
        parts = [given[output]] if isinstance(output, int) and output < len(given) else list(given)
    else:
        parts = [given]
    return [loss for loss in parts if loss is not None]


def _from_loss(given: Any, axis: int | None) -> str | None:
    """Return the activation of a loss of logits, or "probabilities" or "values", as it takes them; None if unknown."""
    loss = losses.get(given)
    if isinstance(loss, GaussianNll):
        return "gaussian"
    from_logits = getattr(loss, "from_logits", None)
    if from_logits is None and inspect.isfunction(loss):
        default = inspect.signature(loss).parameters.get("from_logits")
        from_logits = default.default if default else None
    if from_logits is None:
        home = loss.__module__ if inspect.isfunction(loss) else type(loss).__module__
        of_sequences = loss is losses.ctc or isinstance(loss, losses.CTC)
        return "values" if home.startswith("keras.") and not of_sequences else None
    if not from_logits:
        return "probabilities"
    if isinstance(loss, _BINARY) or loss in _BINARY_FUNCTIONS:
        return "sigmoid"
    of_loss = getattr(loss, "axis", -1)
    if axis is None and of_loss != -1:
        raise DataError(f"the loss has the classes along axis {of_loss}, not along the last: pass axis={of_loss}")
    return "softmax"


def _check_pairs(outputs: NDArray[Any]) -> None:
    check_pairs(outputs.shape)


def _refuse_probabilities(outputs: NDArray[Any], *, axis: int | None) -> None:
    refuse_probabilities(outputs, softmax_axis(outputs.shape, axis, classes_last=classes_last()))


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
