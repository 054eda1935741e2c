"""Where the managed loop's batches come from: data that lies on the device, or any loader."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from snapcore import DataError, ProtocolError
from snapcore.backend import Data, targets
from snapcore.run import Alone, Group
from snapcore_torch.state import to_torch

CHUNK = 50
"""Updates whose examples are looked up at once."""


class Feed(Protocol):
    """Batches by update."""

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of updates `start … stop − 1`."""
        ...


class DeviceFeed:
    """Batches indexed out of tensors that lie on the device, in the data's own order.

    Arguments:
        data: such as `snapcore.data.TrainingData`.
        device: where examples and targets are put, once.
        group: the processes that share every batch, each an equal part of it.

    Raises:
        DataError: a batch cannot be shared equally.
    """

    def __init__(self, data: Data, device: torch.device, group: Group | None = None) -> None:
        group = group or Alone()
        batch = data.indices(0, 1).shape[1]
        if batch % group.size:
            raise DataError(
                f"batch_size must be a multiple of the {group.size} processes that share each batch, got {batch}"
            )
        self._part = slice(group.rank * batch // group.size, (group.rank + 1) * batch // group.size)
        self._data = data
        self._x = to_torch(data.x).to(device)
        y = to_torch(targets(data)).to(device)
        self._y = y if y.is_floating_point() else y.long()  # the one type that every loss of class numbers takes

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of updates `start … stop − 1`, or this process's part of each."""
        for begin in range(start, stop, CHUNK):
            chunk = torch.from_numpy(self._data.indices(begin, min(begin + CHUNK, stop))[:, self._part])
            for rows in chunk.to(self._x.device, non_blocking=True):
                yield self._x[rows], self._y[rows]


class LoaderFeed:
    """Batches of any loader of (inputs, labels), epoch after epoch.

    The order is the loader's own, so it cannot be entered at a given update: a loop over it continues in the same
    process only. A run that is to resume after a kill takes `SnapshotRun.batches`, or data in memory.

    Arguments:
        loader: such as a `torch.utils.data.DataLoader`; walked again whenever it ends.
        device: where each batch is put.
    """

    def __init__(self, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> None:
        self._device = device
        self._endless = _endless(loader)
        self._given = 0

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the next `stop − start` batches.

        Raises:
            DataError: the loader gives no batch.
            ProtocolError: `start` is not the number of batches given so far.
        """
        if start != self._given:
            raise ProtocolError(
                f"a loader's batches come in order, and update {start} was asked for after {self._given}: to resume "
                "after a kill, use SnapshotRun.batches, or data in memory"
            )
        for _ in range(start, stop):
            x, y = next(self._endless)
            self._given += 1
            yield x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)


def _endless(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise DataError("the loader gave no batch: it must be one that can be walked again every epoch")
