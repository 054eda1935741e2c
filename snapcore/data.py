"""Training data in memory, and the order its batches come in.

The order is a function of the seed and the step alone, so that every framework sees the same batches, and a resumed
run sees those that it would have seen without the interruption.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snapcore.errors import DataError


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Examples, labels, and a seeded order.

    Arguments:
        x: inputs, shape [examples, …], any dtype.
        y: labels, integers in 0 … n_classes − 1, shape [examples].
        n_classes: how many classes there are.
        batch_size: examples per update, 1 … examples. The rest of an epoch's order is dropped.
        seed: of the order.

    Raises:
        DataError: the numbers of examples and labels differ, a label is out of range, or the batch is too large.
    """

    x: NDArray[Any]
    y: NDArray[np.integer[Any]]
    n_classes: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"x and y must be equally long, got {len(self.x)} examples and {len(self.y)} labels")
        if not 1 <= self.batch_size <= len(self.x):
            raise DataError(f"batch_size must be in 1..{len(self.x)} examples, got {self.batch_size}")
        check_labels(self.y, self.n_classes)

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


def check_labels(labels: NDArray[Any], n_classes: int) -> None:
    """Raise `DataError` unless all `labels` are integers in 0 … n_classes − 1."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be integers in 0..{n_classes - 1}, got dtype {labels.dtype}")
    outside = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if outside.size:
        first = int(outside[0])
        raise DataError(f"labels must be in 0..{n_classes - 1}, got {labels.flat[first]} at position {first}")
