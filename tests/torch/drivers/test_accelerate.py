"""Accelerate, and every trainer in two processes: updates count once, whatever number of processes did them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from snapcore import CosineCycles
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotLR, SnapshotRun

from .training import SIXTY, assert_members, examples, network, plain_loop, sgd, steps

pytestmark = pytest.mark.xdist_group("accelerate")  # what its tests share is made once
UPDATES = 12
CYCLES, TWICE = (CosineCycles(lr=0.1, steps=times * UPDATES, cycles=3) for times in (1, 2))


def test_in_one_process_prepared_objects_train_as_a_plain_loop_does(tmp_path):
    """Accelerate's optimizer is a wrapper that runs no hooks: its inside is counted."""
    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = sgd(model)
    wrapped, prepared, scheduler = accelerator.prepare(model, optimizer, SnapshotLR(optimizer, SIXTY))
    batches = list(zip(*(part.split(6) for part in examples()), strict=True))
    with SnapshotRun(tmp_path, SIXTY, wrapped, prepared) as run:
        for x, y in run.batches(batches):
            accelerator.backward(nn.functional.cross_entropy(wrapped(x), y))
            prepared.step()
            prepared.zero_grad()
            scheduler.step()
            run.step()
    assert steps(tmp_path) == [20, 40, 60]
    assert_members(tmp_path, plain_loop())


def test_micro_batches_under_accumulate_do_not_count(tmp_path):
    """Users ask for cycles that are right under gradient accumulation."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    model, prepared, scheduler = accelerator.prepare(model, optimizer, SnapshotLR(optimizer, CYCLES))
    with SnapshotRun(tmp_path, CYCLES, model, prepared) as run:
        for micro_batch in range(1, 4 * UPDATES + 1):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(2, 3)).square().mean())
                prepared.step()
                prepared.zero_grad()
                scheduler.step()
                run.step()
            assert run.updates == scheduler.scheduler.last_epoch == micro_batch // 4
            assert optimizer.param_groups[0]["lr"] == CYCLES(micro_batch // 4)
    assert steps(tmp_path) == [4, 8, 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left behind, see `processes.py`."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launch, str(Path(__file__).with_name("processes.py")), str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def seen(folder, name):
    """What each process saw. They trained together: the same parameters, from batches of their own."""
    both = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    first, second = (each["weights"] for each in both)
    differing = {key for key, value in first.items() if value != second[key]}
    assert {key.rsplit(".", 1)[1] for key in differing} == {"running_mean", "running_var"}
    assert [each["processes"] for each in both] == [2, 2]
    return both


def assert_last_member(folder, name, weights):
    """The last member holds what process 0 has at the end, with its own batch statistics."""
    last = SnapshotStore(folder / name).load(3)
    assert {key: array.tolist() for key, array in last.items()} == weights


def test_two_processes_step_accelerates_scheduler_twice_for_each_update(folder):
    """With the schedule of twice the steps, which Accelerate asks for, every update has the rate of its step."""
    for each in seen(folder, "accelerate"):
        assert each["last_epoch"] == [2 * (batch // 2) for batch in range(1, 2 * UPDATES + 1)]
        assert each["scheduled"] == [TWICE(2 * (batch // 2)) for batch in range(1, 2 * UPDATES + 1)]


def test_a_run_counts_each_update_once_in_both_processes_and_one_writes(folder):
    """Users ask for cycles that are right on several devices and under gradient accumulation."""
    both = seen(folder, "accelerate")
    for each in both:
        assert each["updates"] == [batch // 2 for batch in range(1, 2 * UPDATES + 1)]
        assert each["rates"] == [CYCLES(batch // 2) for batch in range(2 * UPDATES)]
    assert steps(folder / "accelerate") == [4, 8, 12]
    assert_last_member(folder, "accelerate", both[0]["weights"])


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_trainers_callback_counts_each_update_once_in_both_processes_and_one_writes(folder, name):
    """Lightning's training was interrupted after 9 updates and resumed from a checkpoint after 5."""
    both = seen(folder, name)
    for each in both:
        assert each["rates"] == [CYCLES(step) for step in range(UPDATES)]
    assert steps(folder / name) == [4, 8, 12]
    assert_last_member(folder, name, both[0]["weights"])
