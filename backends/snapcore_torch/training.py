"""The native loop: updates over data that lies on the device, or over any loader.

Nothing is read back between two reports: losses stay on the device until a chunk of them is.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snapcore import DataError, Schedule
from snapcore.backend import Data, Report
from snapcore_torch.schedule import GroupRates
from snapcore_torch.state import to_torch

Loss = Callable[[Any, Tensor], Tensor]
CHUNK = 50
"""Updates between two reports."""


class Feed(Protocol):
    """Batches by update."""

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of updates `start … stop − 1`."""
        ...


class DeviceFeed:
    """Batches indexed out of tensors that lie on the device, in the data's own order.

    Arguments:
        data: such as `snapcore.data.TrainingData`.
        device: where examples and labels are put, once.
    """

    def __init__(self, data: Data, device: torch.device) -> None:
        self._data = data
        self._x = to_torch(data.x).to(device)
        self._y = to_torch(data.y).to(device, torch.int64)  # the one type that every loss takes

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of updates `start … stop − 1`."""
        for begin in range(start, stop, CHUNK):
            chunk = torch.from_numpy(self._data.indices(begin, min(begin + CHUNK, stop)))
            for rows in chunk.to(self._x.device, non_blocking=True):
                yield self._x[rows], self._y[rows]


class LoaderFeed:
    """Batches of any loader of (inputs, labels), epoch after epoch.

    Arguments:
        loader: such as a `torch.utils.data.DataLoader`; walked again whenever it ends.
        device: where each batch is put.
    """

    def __init__(self, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> None:
        self._device = device
        self._endless = _endless(loader)

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the next `stop − start` batches.

        Raises:
            DataError: the loader gives no batch.
        """
        for _ in range(start, stop):
            x, y = next(self._endless)
            yield x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)


def _endless(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise DataError("the loader gave no batch: it must be one that can be walked again every epoch")


@dataclass
class Loop:
    """One model, its optimizer and its batches, at a schedule's rates.

    Arguments:
        model: takes a batch of inputs.
        optimizer: its groups follow the schedule in their `rates`.
        feed: the batches.
        schedule: the rate of every update.
        rates: each parameter group's share of the rate.
        loss: of (outputs, labels), a scalar tensor; default cross-entropy of logits.
        autocast: the dtype to compute in, such as `torch.bfloat16`; None keeps the weights'.
    """

    model: nn.Module
    optimizer: Optimizer
    feed: Feed
    schedule: Schedule
    rates: GroupRates
    loss: Loss = field(default_factory=nn.CrossEntropyLoss)
    autocast: torch.dtype | None = None

    def run(self, start: int, stop: int, report: Report) -> None:
        """Do updates `start … stop − 1`; report every loss, a chunk at a time."""
        self.model.train()
        losses: list[Tensor] = []
        for step, (x, y) in enumerate(self.feed.batches(start, stop), start):
            self.rates.apply(self.schedule(step))
            losses.append(self._update(x, y))
            if len(losses) == CHUNK:
                _flush(losses, step + 1, report)
        _flush(losses, stop, report)

    def _update(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.loss(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _flush(losses: list[Tensor], step: int, report: Report) -> None:
    if losses:
        first = step - len(losses) + 1
        for update, loss in enumerate(torch.stack(losses).tolist(), first):
            report(update, loss)
        losses.clear()
