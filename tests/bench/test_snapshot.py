"""How long a snapshot of 100 MB keeps the loop waiting, beside a bare copy and beside `torch.save`."""

import os
from collections.abc import Iterator
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
    with _snapshots(tmp_path, model) as ours:
        compare(
            "run.step() that takes 100 MB",
            ours,
            {"[t.clone() for t in state]": _clones(model)},
            target="≤ 1.3",
        )


def test_loop_waits_for_a_snapshot_beside_torch_save(compare, tmp_path):
    model, file = hundred_megabytes(), tmp_path / "state.pt"
    with _snapshots(tmp_path / "run", model) as ours:
        compare(
            "run.step() that takes 100 MB",
            ours,
            {
                "torch.save": Contender(lambda: torch.save(model.state_dict(), file)),
                "torch.save + fsync": Contender(lambda: _save_and_flush(model, file)),
            },
        )
    file.unlink()


@contextmanager
def _snapshots(directory: Path, model: nn.Module) -> Iterator[Contender]:
    """Give one snapshot per sample; before it, the writer becomes idle and the member before it is deleted."""
    schedule = StepDecay(lr=0.1, steps=SNAPSHOTS, snapshots=SNAPSHOTS)
    with SnapshotRun(directory, schedule, model, SGD(model.parameters(), lr=0.1)) as run:

        def prepare() -> None:
            run._recorder._writer.drain()
            for file in directory.glob("snapshot-*"):
                file.unlink()

        yield Contender(lambda: run.step(updates=1), prepare)
        prepare()


def _clones(model: nn.Module) -> Contender:
    """Give copies that are kept, as a snapshot is: to free them is no part of taking them."""
    kept: list[torch.Tensor] = []
    state = list(model.state_dict().values())
    return Contender(lambda: kept.extend([tensor.clone() for tensor in state]), kept.clear)


def _save_and_flush(model: nn.Module, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(model.state_dict(), file)
        file.flush()
        os.fsync(file.fileno())
