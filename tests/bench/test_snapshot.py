"""How long a snapshot of 100 MB keeps the loop waiting, beside a bare copy and beside `torch.save`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD

from snapcore import StepDecay
from snapcore_torch import SnapshotRun

from .compare import Contender
from .workloads import hundred_megabytes

SNAPSHOTS = 500


def test_loop_waits_for_a_snapshot_about_as_long_as_for_a_copy(compare, tmp_path):
    model = hundred_megabytes()
    with _snapshots(tmp_path, model) as (ours, prepare, kept):
        state = list(model.state_dict().values())
        copies = Contender(lambda: kept.extend([tensor.clone() for tensor in state]), prepare)
        compare("run.step() that takes 100 MB", ours, {"[t.clone() for t in state]": copies}, target="≤ 1.3")


def test_loop_waits_for_a_snapshot_beside_torch_save(compare, tmp_path):
    model, file = hundred_megabytes(), tmp_path / "state.pt"
    with _snapshots(tmp_path / "run", model) as (ours, prepare, _):
        compare(
            "run.step() that takes 100 MB",
            ours,
            {
                "torch.save": Contender(lambda: torch.save(model.state_dict(), file), prepare),
                "torch.save + fsync": Contender(lambda: _save_and_flush(model, file), prepare),
            },
        )
    file.unlink()


def test_loop_waits_for_a_resume_point_about_as_long_as_for_a_copy_of_model_and_optimizer(compare, tmp_path):
    model = hundred_megabytes()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    state, kept = [*model.state_dict().values(), *moments], []
    with SnapshotRun(tmp_path, StepDecay(lr=0.1, steps=10**6), model, optimizer, resume_every=1) as run:

        def prepare() -> None:
            run._recorder._saving.drain()
            kept.clear()

        ours = Contender(lambda: run.step(updates=1), prepare)
        copies = Contender(lambda: kept.extend([tensor.clone() for tensor in state]), prepare)
        compare(
            "run.step() with a resume point of 200 MB", ours, {"[t.clone() for t in state]": copies}, target="≤ 1.3"
        )
        run.finish("measured")


@contextmanager
def _snapshots(directory: Path, model: nn.Module) -> Iterator[tuple[Contender, Callable[[], None], list[torch.Tensor]]]:
    """Give one snapshot per sample, and what makes all contenders begin alike: an idle writer, no files, no copies."""
    schedule = StepDecay(lr=0.1, steps=SNAPSHOTS, snapshots=SNAPSHOTS)
    kept: list[torch.Tensor] = []
    with SnapshotRun(directory, schedule, model, SGD(model.parameters(), lr=0.1)) as run:

        def prepare() -> None:
            run._recorder._saving.drain()
            kept.clear()
            for file in directory.glob("snapshot-*"):
                file.unlink()

        yield Contender(lambda: run.step(updates=1), prepare), prepare, kept
        prepare()


def _save_and_flush(model: nn.Module, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(model.state_dict(), file)
        file.flush()
        os.fsync(file.fileno())
