"""A schedule's rate in PyTorch's terms: per parameter group, and as a learning rate scheduler."""

import math
import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from snapcore import Schedule, ScheduleError, schedule_from_dict


class GroupRates:
    """Each parameter group's share of the schedule's rate: its initial rate over the reference.

    The reference is the optimizer's default rate, if some group started with it, else the largest initial rate. Rates
    that are tensors, one for each group, are filled in place, which neither recompiles nor breaks a captured graph.

    Arguments:
        optimizer: whose groups' `initial_lr`, or else `lr`, count.
        reference_lr: used instead of the reference found.

    Raises:
        ScheduleError: no group has a rate above 0, or `reference_lr` is not above 0.
    """

    def __init__(self, optimizer: Optimizer, reference_lr: float | None = None) -> None:
        initial = [_initial(group) for group in optimizer.param_groups]
        default = float(optimizer.defaults.get("lr", math.nan))
        found = default if default in initial else max(initial)
        self.reference = found if reference_lr is None else reference_lr
        if not 0 < self.reference < math.inf:
            raise ScheduleError(
                f"reference_lr must be above 0, got {self.reference}: the groups' rates are relative to it. Build the "
                "optimizer with its usual rates"
            )
        self._optimizer = optimizer
        self.ratios: list[float] = []
        self._applied: list[Any] = []
        self.extend()

    def extend(self) -> bool:
        """Take in the groups that were added to the optimizer since; return whether there were any."""
        known = len(self.ratios)
        groups = self._optimizer.param_groups
        for index, group in enumerate(groups[len(self.ratios) :], len(self.ratios)):
            if isinstance(group["lr"], Tensor):
                if any(group["lr"] is other["lr"] for other in groups[:index]):
                    group["lr"] = group["lr"].clone()
                group.setdefault("initial_lr", group["lr"].clone())
            group.setdefault("initial_lr", group["lr"])  # where schedulers look, and the next run of this optimizer
            self.ratios.append(_initial(group) / self.reference)
        return len(groups) > known

    def of(self, rate: float) -> list[Any]:
        """Return every group's share of `rate`, those of groups added since among them.

        Raises:
            ScheduleError: groups were removed.
        """
        ratios, groups = self.ratios, self._optimizer.param_groups
        if len(groups) != len(ratios) and not self.extend():  # asked for at every update, and hardly ever so
            raise ScheduleError(
                f"the optimizer has {len(groups)} parameter groups and had {len(ratios)}: "
                "groups cannot be removed; set requires_grad to False instead"
            )
        return [rate * ratio for ratio in ratios]

    def apply(self, rate: float) -> None:
        """Give every group its share of `rate`."""
        self._applied = applied = self.of(rate)
        for index, group in enumerate(self._optimizer.param_groups):
            if group["lr"].__class__ is float or not isinstance(group["lr"], Tensor):  # nearly always the first
                group["lr"] = applied[index]
            else:
                group["lr"].fill_(applied[index])
                applied[index] = _written(group["lr"])

    def taken_over(self) -> float | None:
        """Return the rate, in the schedule's terms, that someone else has set since `apply`; None if nobody has."""
        for group, ratio, applied in zip(self._optimizer.param_groups, self.ratios, self._applied, strict=False):
            if _written(group["lr"]) != applied:
                return float(group["lr"]) / (ratio or 1.0)
        return None


def _written(rate: Any) -> Any:
    """Return what shows whether a rate was set since; of a tensor not its value, which may be on a GPU."""
    return (id(rate), rate._version) if isinstance(rate, Tensor) else rate


def _initial(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


_NOT_STATE = ("optimizer", "_schedule", "_rates")


class SnapshotLR(LRScheduler):
    """Set the optimizer's rate from a schedule, once per update.

    An ordinary scheduler: call `step()` after every `optimizer.step()`. The rate is a pure function of
    `last_epoch`, the updates done, so it can be resumed, chained and driven by any trainer. Parameter groups keep
    their ratio to the reference rate, see `GroupRates`.

    Arguments:
        optimizer: any `torch.optim.Optimizer`.
        schedule: such as `snapcore.CosineCycles`; from `schedule.steps` on, its last rate holds.
        last_epoch: as in every scheduler of PyTorch, −1 to start.
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
        self._rates = GroupRates(optimizer, reference_lr)
        super().__init__(optimizer, last_epoch)

    @property
    def schedule(self) -> Schedule:
        """The schedule that it follows."""
        return self._schedule

    def get_lr(self) -> list[float | Tensor]:
        """Return each group's rate for the update that follows `last_epoch` others."""
        if not self._get_lr_called_within_step:
            warnings.warn("to read the rate last set, use get_last_lr()", UserWarning, stacklevel=2)
        if len(self.optimizer.param_groups) > len(self.base_lrs):
            self.extend()
        rates: list[float | Tensor] = [*self._rates.of(self._schedule(self.last_epoch))]
        return rates

    def extend(self) -> None:
        """Take in parameter groups that were added to the optimizer, at their ratio to the reference rate.

        `step` does it by itself, before it sets the rates.
        """
        self._rates.extend()
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(group["initial_lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, which `torch.load` accepts with `weights_only=True`."""
        state = {name: value for name, value in self.__dict__.items() if name not in _NOT_STATE}
        return {**state, "schedule": self._schedule.to_dict(), "ratios": self._rates.ratios[:]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the position; the argument is not changed.

        Raises:
            ScheduleError: the state was saved under another schedule.
        """
        state = dict(state_dict)
        saved = schedule_from_dict(state.pop("schedule"))
        if saved != self._schedule:
            raise ScheduleError(f"the state belongs to {saved}, this scheduler follows {self._schedule}: use the same")
        self._rates.ratios[:] = state.pop("ratios")
        self.__dict__.update(state)
