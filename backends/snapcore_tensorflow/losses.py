"""The losses of managed runs, each the mean over all that counts; outputs are [batch, …, n_outputs], channels last."""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from snapcore.backend import negative_log_density


class Loss:
    """A loss, of which a replica computes its share: that of its part of a batch, over all that counts in the batch.

    Arguments:
        name: of the loss, in `snapcore.data.LOSSES`.
        ignore: the class number of what does not count. Where nothing counts, the loss and its gradient are 0.
    """

    def __init__(self, name: str, ignore: int | None = None) -> None:
        self._each, self._ignore = _LOSSES[name], ignore

    def share(self, outputs: Any, targets: Any, batch: Any) -> Any:
        """Return a part's share of the loss, a scalar.

        Arguments:
            outputs: of the part, in float32.
            targets: of the part.
            batch: the targets of the whole batch.
        """
        if self._ignore is None:
            each = self._each(outputs, targets)
            return tf.reduce_sum(each) / (batch.shape[0] * math.prod(each.shape[1:]))
        counts = tf.not_equal(targets, self._ignore)
        each = tf.where(counts, self._each(outputs, tf.where(counts, targets, 0)), 0.0)
        counted = tf.reduce_sum(tf.cast(tf.not_equal(batch, self._ignore), tf.float32))
        return tf.reduce_sum(each) / tf.maximum(counted, 1.0)


def _cross_entropy(logits: Any, labels: Any) -> Any:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def _binary_cross_entropy(logits: Any, labels: Any) -> Any:
    return tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)


def _gaussian_nll(outputs: Any, targets: Any) -> Any:
    return negative_log_density(outputs, targets, tf.exp)


_LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "cross-entropy": _cross_entropy,
    "binary-cross-entropy": _binary_cross_entropy,
    "squared-error": tf.math.squared_difference,
    "gaussian-nll": _gaussian_nll,
}
