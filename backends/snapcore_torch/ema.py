"""Averaged weights as members: the averages themselves are a module's, here is what belongs to them."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return averages a ← decay·a + (1 − decay)·w of parameters and buffers; the first update sets a = w."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]


class AverageCount:
    """How many updates are in an average, as state for resume points; the averages are there as the members' weights.

    Arguments:
        average: whose count it is.
    """

    def __init__(self, average: AveragedModel) -> None:
        self._average = average

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"count": int(self._average.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the count."""
        self._average.n_averaged.fill_(state["count"])

    def start_over(self) -> None:
        """Have the next update set the averages to its weights, as the first one did."""
        self._average.n_averaged.zero_()
