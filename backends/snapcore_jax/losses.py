"""The losses of managed runs, each the mean over all that counts; outputs are [batch, …, n_outputs], channels last."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax

from snapcore.backend import negative_log_density

Loss = Callable[[Any, Any], Any]


def make_loss(name: str, ignore: int | None = None) -> Loss:
    """Return the loss of (outputs, targets) that is called so in `snapcore.data.LOSSES`, a scalar; equal for equals.

    Arguments:
        name: of the loss.
        ignore: the class number of what does not count. Where nothing counts, the loss and its gradient are 0.
    """
    return _LOSSES[name] if ignore is None else CrossEntropyOfSome(ignore)


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Return the mean cross-entropy of logits, [batch, …, classes], with class numbers, [batch, …]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@dataclass(frozen=True)
class CrossEntropyOfSome:
    """The same of the positions whose label is not `ignore`."""

    ignore: int

    def __call__(self, logits: Any, labels: Any) -> Any:
        """Return the loss."""
        counts = labels != self.ignore
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, labels, 0))
        return each.sum(where=counts) / jnp.maximum(counts.sum(), 1)


def binary_cross_entropy(logits: Any, labels: Any) -> Any:
    """Return the mean cross-entropy of each label's own logit, with labels 0 and 1; both [batch, …, labels]."""
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def squared_error(values: Any, targets: Any) -> Any:
    """Return the mean squared error; both [batch, …, values]."""
    return optax.squared_error(values, targets).mean()


def gaussian_nll(outputs: Any, targets: Any) -> Any:
    """Return the mean of −ln N(target; mean, variance), in nats.

    Arguments:
        outputs: means, then ln variances, [batch, …, 2 · values].
        targets: [batch, …, values].
    """
    return negative_log_density(outputs, targets, jnp.exp).mean()


_LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "binary-cross-entropy": binary_cross_entropy,
    "squared-error": squared_error,
    "gaussian-nll": gaussian_nll,
}
