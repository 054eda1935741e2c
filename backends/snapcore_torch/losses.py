"""The losses of managed runs, each the mean over all that counts; outputs are [batch, …, n_outputs], channels last."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from snapcore.backend import negative_log_density

Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(name: str, ignore: int | None = None) -> Loss:
    """Return the loss of (outputs, targets) that is called so in `snapcore.data.LOSSES`, a scalar tensor.

    Arguments:
        name: of the loss.
        ignore: the class number of what does not count. Where nothing counts, the loss and its gradient are 0.
    """
    return _LOSSES[name] if ignore is None else functools.partial(_cross_entropy_of_some, ignore=ignore)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits, [batch, …, classes], with class numbers, [batch, …]."""
    return functional.cross_entropy(logits.movedim(-1, 1), labels)


def _cross_entropy_of_some(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    total = functional.cross_entropy(logits.movedim(-1, 1), labels, ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of each label's own logit, with labels 0 and 1; both [batch, …, labels]."""
    return functional.binary_cross_entropy_with_logits(_wide(logits), labels)


def squared_error(values: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error; both [batch, …, values]."""
    return functional.mse_loss(_wide(values), targets)


def gaussian_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of −ln N(target; mean, variance), in nats.

    `torch.nn.functional.gaussian_nll_loss` takes no ln variance: it bounds the variance from below.

    Arguments:
        outputs: means, then ln variances, [batch, …, 2 · values].
        targets: [batch, …, values].
    """
    return torch.mean(negative_log_density(_wide(outputs), targets, torch.exp))


def _wide(outputs: Tensor) -> Tensor:
    """Return outputs that were computed in half precision in float32."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


_LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "binary-cross-entropy": binary_cross_entropy,
    "squared-error": squared_error,
    "gaussian-nll": gaussian_nll,
}
