"""What the managed loop, a whole managed run and frequent snapshots cost, beside loops without them."""

import io
import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from snapcore import Schedule, StepDecay, program
from snapcore.data import TrainingData
from snapcore.run import execute
from snapcore_torch import SnapshotRun
from snapcore_torch.backend import TorchBackend

from .compare import PAIRS, Contender
from .workloads import BATCH, LR, cnn_and_sgd, digits, indexed, noise, updates_of

EVERY = 50
Loop = Callable[[], object]


def test_managed_loop_beside_a_hand_written_one(compare):
    data = digits()
    updates = 2 * data.updates_per_epoch
    managed, by_hand, by_loader = (_anew(make, data, updates) for make in (_managed, _by_hand, _by_loader))
    compare(
        "managed loop, CNN on digits, per update",
        managed,
        {"by hand, same tensors and indices": by_hand, "by hand, DataLoader": by_loader},
        target="interval reaches ≤ 1.02",
    )


def test_whole_run_beside_torchensemble(compare, tmp_path):
    torchensemble = pytest.importorskip("torchensemble", reason="torchensemble is not installed: make bench does")
    data, epochs, members = digits(), 4, 2
    method = program("snapshot", lr=LR, steps=epochs * data.updates_per_epoch, cycles=members)
    folders = (tmp_path / str(number) for number in itertools.count())

    def ours() -> None:
        execute(method, TorchBackend(), model="cnn", data=data, directory=next(folders), device="cpu")

    def theirs() -> None:
        ensemble = torchensemble.SnapshotEnsembleClassifier(
            estimator=cnn_and_sgd(data)[0], n_estimators=members, cuda=False
        )
        ensemble.set_optimizer("SGD", lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
        ensemble.set_criterion(nn.CrossEntropyLoss())
        with redirect_stdout(io.StringIO()):  # it prints once an epoch, whatever the interval
            ensemble.fit(_loader(data), epochs=epochs, log_interval=10**9, save_model=False)

    compare(
        f"execute(): {epochs} epochs, {members} members flushed to disk",
        Contender(ours),
        {"torchensemble fit(): DataLoader, members in memory, nothing saved or logged": Contender(theirs)},
    )


@pytest.mark.parametrize(("side", "updates"), [(8, 2 * EVERY), (28, EVERY)])
def test_throughput_with_a_snapshot_every_50_updates(compare, tmp_path, side, updates):
    data = noise(side)
    often = StepDecay(lr=LR, steps=10 * EVERY, snapshots=10)
    never = StepDecay(lr=LR, steps=10 * EVERY)
    with _RunOfOnesOwn(data, tmp_path / "often", often) as ours, _RunOfOnesOwn(data, tmp_path / "never", never) as peer:
        compare(
            f"a snapshot every {EVERY} updates, CNN {side}×{side}, per update",
            ours.contender(updates),
            {"the same run, none due": peer.contender(updates), "no run": _anew(_by_hand, data, updates)},
            target="≤ 1.02",
        )


def test_throughput_with_a_resume_point_every_100_updates(compare, tmp_path):
    data, schedule = noise(28), StepDecay(lr=LR, steps=1000)
    often = _RunOfOnesOwn(data, tmp_path / "often", schedule, resume_every=100)
    with often as ours, _RunOfOnesOwn(data, tmp_path / "never", schedule) as peer:
        compare(
            "a resume point every 100 updates, CNN 28×28, per update",
            ours.contender(100),
            {"the same run, without": peer.contender(100)},
            target="≤ 1.03",
            pairs=min(PAIRS, 15),
        )


def _anew(make: Callable[[TrainingData, int], Loop], data: TrainingData, updates: int) -> Contender:
    """Give every sample a model of its own: how far one is trained, and where it lies in memory, tell on its speed."""
    loops: list[Loop] = []

    def prepare() -> None:
        loops[:] = [make(data, updates)]

    def run() -> None:
        loops[0]()

    return Contender(run, prepare, units=updates)


def _managed(data: TrainingData, updates: int) -> Loop:
    backend, method = TorchBackend(), program("snapshot", lr=LR, steps=10**6, cycles=2)
    state = backend.init("cnn", data, method, seed=0, device="cpu")
    return lambda: backend.train(state, 0, updates, report=lambda _, loss: math.isfinite(loss))


def _by_hand(data: TrainingData, updates: int) -> Loop:
    model, optimizer = cnn_and_sgd(data)
    update, batches, cycle = updates_of(model, optimizer), indexed(data), 500_000

    def run() -> None:
        for step, (x, y) in enumerate(batches(0, updates)):
            optimizer.param_groups[0]["lr"] = LR / 2 * (math.cos(math.pi * (step % cycle) / cycle) + 1)
            update(x, y)

    return run


def _by_loader(data: TrainingData, updates: int) -> Loop:
    update, loader = updates_of(*cnn_and_sgd(data)), _loader(data)

    def run() -> None:
        for _ in range(updates // len(loader)):
            for x, y in loader:
                update(x, y)

    return run


def _loader(data: TrainingData) -> DataLoader:
    dataset = TensorDataset(torch.from_numpy(data.x), torch.from_numpy(data.y))
    dataset.classes = range(data.n_classes)  # else torchensemble walks the data once to count them
    return DataLoader(dataset, BATCH, shuffle=True, drop_last=True)


class _RunOfOnesOwn:
    """A loop with a `SnapshotRun`, begun anew before every sample.

    A sample starts half an interval after a snapshot would be due, so that writing one is a part of the time.
    """

    def __init__(self, data: TrainingData, root: Path, schedule: Schedule, *, resume_every: int | None = None) -> None:
        self._data, self._schedule, self._every = data, schedule, resume_every
        self._directories = (root / str(number) for number in itertools.count())
        self._opened = ExitStack()

    def contender(self, updates: int) -> Contender:
        return Contender(lambda: self._train(updates), self._begin, units=updates)

    def _begin(self) -> None:
        self._opened.close()
        model, optimizer = cnn_and_sgd(self._data)
        self._update, self._batches = updates_of(model, optimizer), indexed(self._data)
        directory = next(self._directories)
        self._run = SnapshotRun(directory, self._schedule, model, optimizer, resume_every=self._every)
        self._opened.enter_context(self._run)
        self._opened.callback(self._run.finish, "measured")
        self._train(EVERY // 2)

    def _train(self, updates: int) -> None:
        for x, y in self._batches(self._run.updates, self._run.updates + updates):
            self._update(x, y)
            self._run.step()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
