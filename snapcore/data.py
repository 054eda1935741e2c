"""Training data in memory, and the order its batches come in.

The order is a function of the seed and the step alone, so that every framework sees the same batches, and a resumed
run sees those that it would have seen without the interruption.
"""

import functools
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snapcore.errors import DataError

LOSSES: Mapping[str, str] = MappingProxyType(
    {
        "cross-entropy": "classes",
        "binary-cross-entropy": "labels",
        "squared-error": "values",
        "gaussian-nll": "gaussian",
    }
)
"""The losses to train with, and the kind of task that each is for, one of those of `snapcore.ensemble.Predictions`."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Examples, what a model is to say of them, and a seeded order.

    A position is what the model answers for: an example, or a pixel or token of one. All losses are means over the
    positions that count, and over the labels or values of each.

    | loss | kind | y | the model's outputs |
    |---|---|---|---|
    | cross-entropy | classes | integers in 0 … n_classes − 1, [examples, …] | logits, [examples, …, n_classes] |
    | binary-cross-entropy | labels | 0 and 1, [examples, …, n_classes] | logits, as y |
    | squared-error | values | floats, [examples, …, n_classes] | the values, as y |
    | gaussian-nll | gaussian | floats, as for squared-error | means, then ln variances, [examples, …, 2 · n_classes] |

    Arguments:
        x: inputs, shape [examples, …], any dtype.
        y: targets, see above. One value an example may come as [examples].
        n_classes: how many classes there are; for the other kinds, how many labels or values a position has.
        batch_size: examples per update, 1 … examples. The rest of an epoch's order is dropped.
        seed: of the order.
        loss: what the model is trained with, a name in `LOSSES`; the gaussian's is −ln of the density, in nats.
        ignore: the number in `y` of what does not count, such as −100 or 255; classes only.

    Raises:
        DataError: the numbers of examples and targets differ, a target is not as the loss needs it, or the batch is too
            large.

    Example:
        >>> data = TrainingData(np.zeros((6, 3)), np.linspace(0.0, 1.0, 6), 1, batch_size=2, loss="gaussian-nll")
        >>> data.kind, data.n_outputs
        ('gaussian', 2)
    """

    x: NDArray[Any]
    y: NDArray[Any]
    n_classes: int
    batch_size: int
    seed: int = 0
    _: KW_ONLY
    loss: str = "cross-entropy"
    ignore: int | None = None

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"x and y must be equally long, got {len(self.x)} examples and {len(self.y)} labels")
        if not 1 <= self.batch_size <= len(self.x):
            raise DataError(f"batch_size must be in 1..{len(self.x)} examples, got {self.batch_size}")
        if self.loss not in LOSSES:
            raise DataError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.kind == "classes":
            check_labels(self.y, self.n_classes, self.ignore)
            return
        if self.ignore is not None:
            raise DataError(f"ignore is for classes alone, got it with loss={self.loss!r}; leave those examples out")
        _check_targets(self.y, self.n_classes, self.kind)

    @property
    def kind(self) -> str:
        """The kind of task: classes, labels, values or gaussian."""
        return LOSSES[self.loss]

    @property
    def n_outputs(self) -> int:
        """How many numbers the model gives per position; the gaussian's are all means, then all ln variances."""
        return 2 * self.n_classes if self.kind == "gaussian" else self.n_classes

    @property
    def updates_per_epoch(self) -> int:
        """Whole batches in one pass over the examples."""
        return len(self.x) // self.batch_size

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the examples of updates `start … stop − 1`, shape [stop − start, batch_size].

        Example:
            >>> data = TrainingData(np.zeros((7, 2)), np.zeros(7, int), n_classes=1, batch_size=3)
            >>> data.indices(0, 4).shape
            (4, 3)
            >>> sorted(map(int, data.indices(0, 2).ravel())) == sorted(set(map(int, data.indices(0, 2).ravel())))
            True
        """
        whole = self.updates_per_epoch
        epochs = range(start // whole, -(-stop // whole)) if start < stop else ()
        orders = ((each * whole, _order(self.seed, each, len(self.x), self.batch_size)) for each in epochs)
        parts = [order[max(start - begin, 0) : stop - begin] for begin, order in orders]
        return np.concatenate(parts) if parts else np.empty((0, self.batch_size), np.int64)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, examples: int, batch_size: int) -> NDArray[np.int64]:
    whole = examples // batch_size * batch_size
    return np.random.default_rng([seed, epoch]).permutation(examples)[:whole].reshape(-1, batch_size)


def check_labels(labels: NDArray[Any], n_classes: int, ignore: int | None = None) -> None:
    """Raise `DataError` unless all `labels` are integers in 0 … n_classes − 1 or `ignore`, and one counts."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be integers in 0..{n_classes - 1}, got dtype {labels.dtype}")
    outside = (labels < 0) | (labels >= n_classes)
    if ignore is not None:
        outside &= labels != ignore
        if (labels == ignore).all():
            raise DataError(f"at least one label must count, got ignore={ignore} alone")
    if outside.any():
        where = np.argwhere(outside)[0].tolist()
        cure = "" if ignore is None else f"; ignore={ignore} alone may lie outside"
        raise DataError(
            f"labels must be in 0..{n_classes - 1}, got {labels[tuple(where)]} at position "
            f"{where[0] if labels.ndim == 1 else where}{cure}"
        )


def _check_targets(y: NDArray[Any], n_classes: int, kind: str) -> None:
    """Raise `DataError` unless `y` is [examples, …, n_classes] of 0 and 1 (labels) or of finite floats."""
    is_one_value = kind != "labels" and n_classes == 1 and y.ndim == 1
    if n_classes < 1 or not (is_one_value or (y.ndim > 1 and y.shape[-1] == n_classes)):
        wanted = "[examples] or [examples, …, 1]" if kind != "labels" and n_classes == 1 else "[examples, …, n_classes]"
        raise DataError(
            f"y must have shape {wanted} for {kind}, got {y.shape} with n_classes={n_classes}: n_classes is how many a "
            "position has, the last axis of y"
        )
    if kind == "labels":
        if not ((y == 0) | (y == 1)).all():
            raise DataError(f"y must be 0 or 1 for each label, got {_first(y, (y != 0) & (y != 1))}")
        return
    if not np.issubdtype(y.dtype, np.floating):
        raise DataError(f"y must be floats for {kind}, got dtype {y.dtype}: pass y.astype(np.float32)")
    with np.errstate(over="ignore"):  # training is in float32, where what is too large is infinite
        wrong = ~np.isfinite(y.astype(np.float32))
    if wrong.any():
        raise DataError(f"y must be finite for {kind}, got {_first(y, wrong)} (in float32): leave those examples out")


def _first(y: NDArray[Any], wrong: NDArray[np.bool_]) -> str:
    where = np.argwhere(wrong)[0].tolist()
    return f"{y[tuple(where)]} at {where}"
