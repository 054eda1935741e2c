"""What one update's bookkeeping costs: a scheduler's step, and a run's step between two snapshots."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR

from snapcore import CosineCycles
from snapcore_torch import SnapshotLR, SnapshotRun

from .compare import Contender

NUMBER = 2000
CYCLES = CosineCycles(lr=0.1, steps=10**8, cycles=4)  # no boundary comes near


def test_scheduler_step_beside_those_of_pytorch(compare):
    ours, plain, restarts = (_optimizer() for _ in range(3))
    compare(
        "SnapshotLR.step()",
        _stepping(SnapshotLR(ours, CYCLES)),
        {
            "LambdaLR.step()": _stepping(LambdaLR(plain, lambda step: 1 / (1 + step))),
            "CosineAnnealingWarmRestarts.step()": _stepping(CosineAnnealingWarmRestarts(restarts, 25_000_000)),
        },
        target="≤ 1.3",
    )


@pytest.mark.parametrize("counted_by", ["caller", "optimizer"])
def test_run_step_between_boundaries(compare, tmp_path, counted_by):
    model = torch.nn.Linear(2, 2)
    with SnapshotRun(tmp_path, CYCLES, model, SGD(model.parameters(), lr=0.1)) as run:

        def said() -> None:
            run.step(updates=1)

        def counted() -> None:
            run._count._counts[0].updates += 1  # what the optimizer's hook does
            run.step()

        name = "run.step(updates=1)" if counted_by == "caller" else "run.step() after a counted update"
        action = said if counted_by == "caller" else counted
        plain = _stepping(LambdaLR(_optimizer(), lambda step: 1 / (1 + step)))
        compare(f"{name}, nothing due", Contender(action, number=NUMBER), {"LambdaLR.step()": plain}, target="≤ 1.3")


def _optimizer() -> SGD:
    return SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)


def _stepping(scheduler: torch.optim.lr_scheduler.LRScheduler) -> Contender:
    scheduler.optimizer.step()  # PyTorch warns of a scheduler that comes before it
    return Contender(scheduler.step, number=NUMBER)
