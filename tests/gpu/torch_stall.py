"""How long a snapshot of ResNet-50's size keeps a loop in PyTorch waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import Setting, Suite
from compare import Contender
from snapshots import wait_for_members
from torch.nn import functional
from torch.optim import SGD
from torch_common import DEVICE, about, awaited, resnet, synchronize

from snapcore import Schedule, StepDecay
from snapcore_torch import SnapshotRun

suite = Suite(about())


class Training:
    """ResNet-50 in bfloat16 on images of noise, and its optimizer; on a CPU a small one."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        width, blocks = setting.pick(full=(64, (3, 4, 6, 3)), small=(16, (1, 1, 1, 1)), tiny=(4, (1, 1)))
        side, batch = setting.pick(full=(224, 64), small=(64, 8), tiny=(32, 2))
        self.model = resnet(width, blocks, 1000, stem=7).to(DEVICE, memory_format=torch.channels_last)
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        x = torch.randn(batch, 3, side, side, device=DEVICE)
        self._x = x.contiguous(memory_format=torch.channels_last)
        self._y = torch.randint(1000, (batch,), device=DEVICE)
        self.update()
        setting.found |= {
            "parameters": sum(each.numel() for each in self.model.parameters()),
            "bytes of weights and moments": sum(each.nbytes for each in self.state()),
            "batch": batch,
            "side": side,
        }

    def update(self) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = functional.cross_entropy(self.model(self._x), self._y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[torch.Tensor]:
        """Return all that is copied at a trough: weights, and for the resume point the moments."""
        moments = [moment for state in self.optimizer.state.values() for moment in state.values()]
        return [*self.model.state_dict().values(), *moments]


@contextmanager
def opened(training: Training, directory: Path, schedule: Schedule) -> Iterator[tuple[SnapshotRun, Callable[[], None]]]:
    """Give a run, and what waits until its members are written and the device has nothing left to do."""
    with SnapshotRun(directory, schedule, training.model, training.optimizer) as run:
        troughs = schedule.snapshot_steps

        def idle() -> None:
            wait_for_members(directory, sum(step <= run.updates for step in troughs))
            synchronize()

        yield run, idle
        run.finish("measured")


@suite.comparison("run.step() at a trough, until it returns")
def until_it_returns(setting: Setting) -> None:
    training = Training(setting)
    kept: list[Any] = []
    with opened(training, setting.folder / "run", StepDecay(lr=0.1, steps=500, snapshots=500)) as (run, idle):

        def prepare() -> None:
            idle()
            kept.clear()

        setting.compare(
            {"run.step() at a trough": Contender(lambda: run.step(updates=1), prepare)},
            {
                "an update, waited for": Contender(awaited(training.update), prepare),
                "a copy on the device, waited for": Contender(
                    awaited(lambda: kept.extend([each.detach().clone() for each in training.state()])), prepare
                ),
                "a copy to the host, waited for": Contender(
                    lambda: kept.extend([each.detach().cpu().clone() for each in training.state()]), prepare
                ),
            },
        )


@suite.comparison("an update, run.step(), and the next update, waited for")
def trough_and_update(setting: Setting) -> None:
    training = Training(setting)
    every, never = StepDecay(lr=0.1, steps=500, snapshots=500), StepDecay(lr=0.1, steps=10**6)
    with (
        opened(training, setting.folder / "every", every) as (ours, idle),
        opened(training, setting.folder / "never", never) as (other, _),
    ):

        def around(run: SnapshotRun | None) -> Contender:
            def two_updates() -> None:
                training.update()
                if run:
                    run.step(updates=1)
                training.update()
                synchronize()

            return Contender(two_updates, idle)

        setting.compare({"at a trough": around(ours)}, {"elsewhere": around(other), "without a run": around(None)})


@suite.comparison("updates with a snapshot among them, per update", share=2)
def throughput(setting: Setting) -> None:
    training = Training(setting)
    updates = setting.pick(full=50, small=10, tiny=4)
    often, never = StepDecay(lr=0.1, steps=500 * updates, snapshots=500), StepDecay(lr=0.1, steps=10**6)
    with (
        opened(training, setting.folder / "often", often) as (ours, idle),
        opened(training, setting.folder / "never", never) as (other, _),
    ):

        def train(run: SnapshotRun | None, number: int) -> None:
            for _ in range(number):
                training.update()
                if run:
                    run.step(updates=1)
            synchronize()

        def contender(run: SnapshotRun | None) -> Contender:
            return Contender(lambda: train(run, updates), idle, units=updates)

        train(ours, updates // 2)  # so that what is written is written within a sample
        setting.compare(
            {f"one snapshot in {updates} updates": contender(ours)},
            {"the same run, none due": contender(other), "no run": contender(None)},
        )
