"""The losses of managed runs, each the mean over all that counts; outputs are [batch, …, n_outputs], channels last."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import losses, ops

from snapcore.backend import negative_log_density


def make_loss(name: str, ignore: int | None = None) -> keras.losses.Loss:
    """Return the loss that is called so in `snapcore.data.LOSSES`.

    Arguments:
        name: of the loss.
        ignore: the class number of what does not count. Where nothing counts, the loss and its gradient are 0.
    """
    return _LOSSES[name]() if ignore is None else _LOSSES[name](ignore_class=ignore)


class GaussianNll(keras.losses.Loss):  # type: ignore[misc]  # Keras is untyped
    """−ln N(target; mean, variance), in nats; outputs are means, then ln variances, [batch, …, 2 · values]."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each value."""
        return negative_log_density(y_pred, y_true, ops.exp)


_LOSSES: dict[str, Callable[..., keras.losses.Loss]] = {
    "cross-entropy": partial(losses.SparseCategoricalCrossentropy, from_logits=True),
    "binary-cross-entropy": partial(losses.BinaryCrossentropy, from_logits=True),
    "squared-error": losses.MeanSquaredError,
    "gaussian-nll": GaussianNll,
}
