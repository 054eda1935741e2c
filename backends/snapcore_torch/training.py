"""The native loop: updates at a schedule's rates.

Nothing is read back between two reports: losses stay on the device until a chunk of them is.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from snapcore import DivergedError, Schedule
from snapcore.backend import Report
from snapcore.run import Alone, Group
from snapcore_torch.batches import CHUNK, Feed
from snapcore_torch.counting import UpdateCount
from snapcore_torch.distributed import mean_over_processes
from snapcore_torch.ema import moving_average
from snapcore_torch.losses import Loss, cross_entropy
from snapcore_torch.options import UpdateOptions
from snapcore_torch.schedule import GroupRates

_LEAST_SCALE = 2.0**-24  # below, a loss scale cannot be what makes gradients infinite


@dataclass
class Loop:
    """One model, its optimizer and its batches, at a schedule's rates.

    Arguments:
        model: takes a batch of inputs.
        optimizer: its groups follow the schedule in their `rates`.
        feed: the batches.
        schedule: the rate of every update.
        rates: each parameter group's share of the rate.
        loss: of (outputs, targets), a scalar tensor, the mean over all that counts; default cross-entropy of logits.
        options: how an update is done.
        group: the processes that train together, each on its part of every batch; gradients are averaged.
        ignore: the label of what the loss leaves out of its mean; None if all counts.
    """

    model: nn.Module
    optimizer: Optimizer
    feed: Feed
    schedule: Schedule
    rates: GroupRates
    loss: Loss = cross_entropy
    options: UpdateOptions = field(default_factory=UpdateOptions)
    group: Group = field(default_factory=Alone)
    ignore: int | None = None

    def __post_init__(self) -> None:
        options = self.options
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack this form
        self.average = None if options.ema is None else moving_average(self.model, options.ema)
        self._forward = self.model if self.group.size == 1 else DistributedDataParallel(self.model)
        compiling = options.compile_arguments
        self._call = self._forward if compiling is None else torch.compile(self._forward, **compiling)
        device = next(self.model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=options.precision == "float16")
        self._count = UpdateCount(self.optimizer) if self.scaler.is_enabled() else None

    @property
    def members(self) -> nn.Module:
        """Whose weights become the members: the averages if there are any, else the model."""
        return self.model if self.average is None else self.average.module

    def run(self, start: int, stop: int, report: Report) -> None:
        """Do updates `start … stop − 1`; report every loss, a chunk at a time.

        Raises:
            DivergedError: gradients overflow in float16 whatever the loss is scaled by.
        """
        self._forward.train()
        losses: list[Tensor] = []
        for step, (x, y) in enumerate(self.feed.batches(start, stop), start):
            self.rates.apply(self.schedule(step))
            losses.append(self._update(x, y))
            if len(losses) == CHUNK:
                self._flush(losses, step + 1, report)
        self._flush(losses, stop, report)

    def _update(self, x: Tensor, y: Tensor) -> Tensor:
        if self.options.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        begun = len(self.optimizer.state)
        loss = self._attempt(x, y)
        while self._count is not None and not self._count.take():
            scale = self.scaler.get_scale()
            if scale < _LEAST_SCALE:
                raise DivergedError(
                    f"gradients overflow in float16 even with the loss scaled by {scale}; earlier members are kept. "
                    "Lower the learning rate, clip gradients, or compute in bfloat16"
                )
            if not begun:  # fused SGD leaves an undefined momentum behind when its very first step is skipped
                self.optimizer.state.clear()
            loss = self._attempt(x, y)
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss

    def _attempt(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self._gradients(x, y)
        if self.options.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _gradients(self, x: Tensor, y: Tensor) -> Tensor:
        parts = self.options.accumulate
        if parts == 1 and (self.ignore is None or self.group.size == 1):
            return self._backward(x, y)
        losses, whole = [], self._whole(y)
        for number, (some, labels) in enumerate(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True), 1):
            # Gradients meet those of the other processes once, at the last micro-batch.
            last = number == parts or not isinstance(self._forward, DistributedDataParallel)
            with nullcontext() if last else cast("DistributedDataParallel", self._forward).no_sync():
                losses.append(self._backward(some, labels, share=self._counted(labels) / whole))
        return torch.stack(losses).sum()

    def _counted(self, y: Tensor) -> int | Tensor:
        """Return how much counts in a part's mean: examples, or labels that are not ignored."""
        return len(y) if self.ignore is None else (y != self.ignore).sum()

    def _whole(self, y: Tensor) -> int | Tensor:
        """Return the same of a whole batch: a process's equal share of what counts in all processes."""
        counted = self._counted(y)
        if isinstance(counted, int):
            return counted
        return mean_over_processes(counted, self.group).clamp(min=1 / self.group.size)

    def _backward(self, x: Tensor, y: Tensor, *, share: float | Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, self.options.autocast, enabled=self.options.autocast is not None):
            loss = self.loss(self._call(x), y)
        if share is not None:
            loss = loss * share
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _flush(self, losses: list[Tensor], step: int, report: Report) -> None:
        if losses:
            first = step - len(losses) + 1
            for update, loss in enumerate(mean_over_processes(torch.stack(losses), self.group).tolist(), first):
                report(update, loss)
            losses.clear()
