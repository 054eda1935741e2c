"""PyTorch's own schedulers of schedulers: which counter they move, and what a saved state brings back."""

import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LinearLR, SequentialLR

from snapcore import CosineCycles
from snapcore_torch import SnapshotLR, SnapshotRun

from .training import SIXTY, assert_members, examples, network, plain_loop, sgd, steps

WARMUP = 5
LATER = CosineCycles(lr=0.02, steps=30, cycles=3)


def optimizer_of(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=rates[0])


def warmed_up(optimizer):
    first = LinearLR(optimizer, start_factor=0.2, total_iters=WARMUP)
    return SequentialLR(optimizer, [first, SnapshotLR(optimizer, SIXTY)], milestones=[WARMUP])


def two_phases(optimizer):
    first, second = SnapshotLR(optimizer, SIXTY), SnapshotLR(optimizer, LATER, reference_lr=0.1)
    return SequentialLR(optimizer, [first, second], milestones=[60])


def chained(optimizer):
    return ChainedScheduler([ConstantLR(optimizer, 0.5, total_iters=7), SnapshotLR(optimizer, SIXTY)])


def expected(make, step):
    if make is warmed_up:
        return 0.1 * (0.2 + 0.8 * step / WARMUP) if step < WARMUP else SIXTY(step - WARMUP)
    if make is two_phases and step >= 60:
        return LATER(step - 60)
    return SIXTY(step)


def drive(optimizer, scheduler, start, stop):
    rates = []
    for _ in range(start, stop):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", [warmed_up, two_phases, chained])
@pytest.mark.parametrize("stop", [0, 1, WARMUP - 1, WARMUP, WARMUP + 1, 25, 59, 60, 61])
def test_a_saved_scheduler_of_schedulers_resumes_where_it_was(make, stop):
    """Warm restarts in PyTorch resume wrongly; ours right, at the milestones too, where `step` is not called."""
    optimizer = optimizer_of(0.1, 0.01)
    scheduler = make(optimizer)
    before = drive(optimizer, scheduler, 0, stop)
    saved = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})

    other = optimizer_of(0.1, 0.01)
    resumed = make(other)
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    rates = before + drive(other, resumed, stop, 65)
    for step, (large, small) in enumerate(rates):
        assert large == pytest.approx(expected(make, step), rel=1e-9)
        assert small == pytest.approx(large / 10, rel=1e-9)


def test_beside_any_scheduler_a_run_has_the_last_word_and_takes_its_members_on_time(tmp_path):
    model = network()
    optimizer = sgd(model)
    scheduler = warmed_up(optimizer)
    batches = list(zip(*(part.split(6) for part in examples()), strict=True))
    with SnapshotRun(tmp_path, SIXTY, model, optimizer) as run:
        for x, y in run.batches(batches):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            run.step()
    assert steps(tmp_path) == [20, 40, 60]
    assert_members(tmp_path, plain_loop())
