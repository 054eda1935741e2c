"""A schedule's rate in PyTorch's terms: per parameter group, and as a learning rate scheduler."""

import math
import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from snapcore import Schedule, ScheduleError, schedule_from_dict


def group_ratios(optimizer: Optimizer, reference_lr: float | None = None) -> list[float]:
    """Return each parameter group's share of the schedule's rate: its initial rate over the reference.

    The reference is the optimizer's default rate, if some group started with it, else the largest initial rate.

    Arguments:
        optimizer: whose groups' `initial_lr`, or else `lr`, count.
        reference_lr: takes the place of the reference found.

    Raises:
        ScheduleError: no group has a rate above 0, or `reference_lr` is not above 0.
    """
    initial = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    default = float(optimizer.defaults.get("lr", math.nan))
    reference = reference_lr if reference_lr is not None else default if default in initial else max(initial)
    if not reference > 0:
        raise ScheduleError(
            f"reference_lr must be above 0, got {reference}: the groups' rates are relative to it. Build the "
            "optimizer with its usual rates; the schedule sets them from the first update on"
        )
    return [rate / reference for rate in initial]


def set_rate(optimizer: Optimizer, rate: float, ratios: list[float]) -> None:
    """Give every parameter group its share of `rate`; tensors are filled in place.

    Raises:
        ScheduleError: a group was added after the ratios were read.
    """
    for group, share in zip(optimizer.param_groups, _shares(optimizer, rate, ratios), strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(share)
        else:
            group["lr"] = share


def _shares(optimizer: Optimizer, rate: float, ratios: list[float]) -> list[float]:
    groups = len(optimizer.param_groups)
    if groups != len(ratios):
        raise ScheduleError(
            f"the optimizer must keep the {len(ratios)} parameter groups it had, got {groups}: add groups before the "
            "schedule is attached, or attach it anew"
        )
    return [rate * ratio for ratio in ratios]


class SnapshotLR(LRScheduler):
    """Set the optimizer's rate from a schedule, once per update.

    An ordinary scheduler: call `step()` after every `optimizer.step()`. The rate is a pure function of
    `last_epoch`, the updates done, so it can be resumed, chained and driven by any trainer. Parameter groups keep
    their ratio to the reference rate, see `group_ratios`.

    Arguments:
        optimizer: any `torch.optim.Optimizer`.
        schedule: such as `snapcore.CosineCycles`; from `schedule.steps` on, its last rate holds.
        last_epoch: as in every scheduler of PyTorch, −1 to begin.
        reference_lr: the rate that the schedule stands for; by default found in the optimizer.

    Raises:
        ScheduleError: no reference rate above 0 can be found.

    Example:
        >>> import torch
        >>> from snapcore import CosineCycles
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
        >>> scheduler = SnapshotLR(optimizer, CosineCycles(lr=0.2, steps=100, cycles=2))
        >>> for _ in range(25):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.get_last_lr()
        [0.1]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        last_epoch: int = -1,
        *,
        reference_lr: float | None = None,
    ) -> None:
        self._schedule = schedule
        self.ratios = group_ratios(optimizer, reference_lr)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return each group's rate for the update that follows `last_epoch` others."""
        if not self._get_lr_called_within_step:
            warnings.warn("to read the rate last set, use get_last_lr()", UserWarning, stacklevel=2)
        return [*_shares(self.optimizer, self._schedule(self.last_epoch), self.ratios)]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, which `torch.load` accepts with `weights_only=True`."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("optimizer", "_schedule")}
        return {**state, "schedule": self._schedule.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the place; the argument is not changed.

        Raises:
            ScheduleError: the state was saved under another schedule.
        """
        state = dict(state_dict)
        saved = schedule_from_dict(state.pop("schedule"))
        if saved != self._schedule:
            raise ScheduleError(f"the state belongs to {saved}, this scheduler follows {self._schedule}: use the same")
        self.__dict__.update(state)
