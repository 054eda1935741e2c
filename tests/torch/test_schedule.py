"""The rate in PyTorch's terms: exact, pure in `last_epoch`, and right under every driver that PyTorch knows."""

import io
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    _enable_get_lr_call,
)

from snapcore import CosineCycles, ScheduleError, StepDecay
from snapcore_torch import SnapshotLR
from snapcore_torch.schedule import GroupRates

CYCLES = CosineCycles(lr=0.1, steps=24, cycles=3, remainder="even")


def sgd(*rates, lr=0.1):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], **({"lr": rate} if rate else {})} for rate in rates or (None,)]
    return torch.optim.SGD(groups, lr=lr)


def rates_of(optimizer, scheduler, updates):
    """Collect each group's rate as `updates` real updates would use it."""
    rates = []
    for _ in range(updates):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def pure(scheduler, last_epoch):
    scheduler.last_epoch = last_epoch
    with _enable_get_lr_call(scheduler):
        return scheduler.get_lr()


def test_it_is_a_scheduler_of_pytorch():
    assert isinstance(SnapshotLR(sgd(), CYCLES), LRScheduler)


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(1e-4, 10),
    steps=st.integers(1, 40),
    share=st.floats(0, 1),
    floor=st.floats(0, 1),
    warmup=st.integers(0, 39),
    remainder=st.sampled_from(["paper", "even"]),
)
def test_the_rate_of_every_update_is_the_schedules_own(lr, steps, share, floor, warmup, remainder):
    warmup = min(warmup, steps - 1)
    cycles = max(1, round(share * (steps - warmup)))
    schedule = CosineCycles(lr, steps, cycles, lr_min=floor * lr, warmup_steps=warmup, remainder=remainder)
    optimizer = sgd(lr=lr)
    found = rates_of(optimizer, SnapshotLR(optimizer, schedule), steps + 3)
    assert found == [[schedule(step)] for step in range(steps + 3)]


def test_the_rate_is_the_papers_equation_2():
    optimizer = sgd(lr=0.2)
    found = rates_of(optimizer, SnapshotLR(optimizer, CosineCycles(0.2, 300, 6)), 300)
    assert found == [[0.2 / 2 * (math.cos(math.pi * ((t - 1) % 50) / 50) + 1)] for t in range(1, 301)]


def test_a_step_schedule_is_followed_too():
    optimizer = sgd()
    rates = rates_of(optimizer, SnapshotLR(optimizer, StepDecay(0.1, 8)), 8)
    assert [rate for (rate,) in rates] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_get_lr_depends_on_last_epoch_alone():
    scheduler = SnapshotLR(sgd(), CYCLES)
    positions = random.Random(1).choices(range(30), k=200)
    assert [pure(scheduler, position) for position in positions] == [[CYCLES(position)] for position in positions]


def test_it_agrees_with_warm_restarts_in_pytorch_on_2000_random_schedules():
    """PyTorch's own formula, at 5 instants of each: the first, the last, and three at random."""
    draw = random.Random(2)
    for _ in range(2000):
        lr, length, cycles = 10 ** draw.uniform(-4, 1), draw.randint(1, 400), draw.randint(1, 12)
        steps = length * cycles
        ours = SnapshotLR(sgd(lr=lr), CosineCycles(lr, steps, cycles))
        theirs = CosineAnnealingWarmRestarts(sgd(lr=lr), T_0=length)
        for step in (0, steps - 1, *(draw.randrange(steps) for _ in range(3))):
            theirs.step(step)
            assert pure(ours, step) == pytest.approx(theirs.get_last_lr(), rel=1e-12, abs=1e-12 * lr)


@settings(max_examples=20, deadline=None)
@given(lr=st.floats(1e-3, 5), floor=st.floats(0, 1), length=st.integers(1, 12), cycles=st.integers(1, 5))
def test_it_agrees_with_warm_restarts_in_pytorch_stepped_once_per_update(lr, floor, length, cycles):
    ours, theirs = sgd(lr=lr), sgd(lr=lr)
    schedule = CosineCycles(lr, length * cycles, cycles, lr_min=floor * lr)
    found = rates_of(ours, SnapshotLR(ours, schedule), length * cycles)
    expected = rates_of(theirs, CosineAnnealingWarmRestarts(theirs, length, eta_min=floor * lr), length * cycles)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-12 * lr)


def test_sequential_warm_up_leads_into_the_first_cycle_without_shifting_it():
    optimizer = sgd()
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=3)
    ours = SnapshotLR(optimizer, CosineCycles(0.1, 8, 2))
    rates = rates_of(optimizer, SequentialLR(optimizer, [warmup, ours], milestones=[3]), 9)
    expected = [0.01, 0.04, 0.07, 0.1, 0.0854, 0.05, 0.0146, 0.1, 0.0854]
    assert [round(rate, 4) for (rate,) in rates] == expected
    assert ours.last_epoch == 9 - 3


def test_chained_last_it_has_the_last_word():
    optimizer = sgd()
    chained = ChainedScheduler([ExponentialLR(optimizer, 0.5), SnapshotLR(optimizer, CYCLES)])
    assert rates_of(optimizer, chained, 24) == [[CYCLES(step)] for step in range(24)]


def test_a_driver_that_counts_itself_and_never_calls_step_gets_the_right_rates():
    """Ignite's handler does `last_epoch += 1` and calls `get_lr()`, no more."""
    scheduler, found = SnapshotLR(sgd(), CYCLES), []
    for _ in range(24):
        scheduler.last_epoch += 1
        with _enable_get_lr_call(scheduler):
            found += scheduler.get_lr()
    assert found == [CYCLES(step) for step in range(1, 25)]


def test_reading_the_rate_with_get_lr_warns_as_in_pytorch():
    scheduler = SnapshotLR(sgd(), CYCLES)
    with pytest.warns(UserWarning, match="get_last_lr"):
        scheduler.get_lr()
    assert scheduler.get_last_lr() == [0.1]


def saved_and_loaded(state):
    """Pass it through a file as `torch.load` reads it by default, which takes plain values only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("schedule", [CYCLES, StepDecay(0.1, 24, snapshots=3)])
def test_a_saved_state_resumes_where_it_was(schedule):
    """Warm restarts in PyTorch resume wrongly."""
    optimizer = sgd(0.1, 0.02)
    scheduler = SnapshotLR(optimizer, schedule)
    before = rates_of(optimizer, scheduler, 10)
    states = saved_and_loaded({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})

    other = sgd(0.1, 0.02)
    resumed = SnapshotLR(other, schedule)
    other.load_state_dict(states["optimizer"])
    resumed.load_state_dict(states["scheduler"])
    ratios = [1.0, 0.02 / 0.1]
    assert before + rates_of(other, resumed, 14) == [[schedule(k) * r for r in ratios] for k in range(24)]


def test_last_epoch_resumes_right():
    """`last_epoch=` of warm restarts in PyTorch resumes wrongly."""
    optimizer = sgd(0.1, 0.02)
    rates_of(optimizer, SnapshotLR(optimizer, CYCLES), 10)
    other = sgd(0.1, 0.02)
    other.load_state_dict(optimizer.state_dict())
    resumed = SnapshotLR(other, CYCLES, last_epoch=9)
    assert rates_of(other, resumed, 14) == [[CYCLES(k), CYCLES(k) * (0.02 / 0.1)] for k in range(10, 24)]


def test_loading_leaves_the_given_state_alone():
    scheduler = SnapshotLR(sgd(), CYCLES)
    state = scheduler.state_dict()
    names = set(state)
    scheduler.load_state_dict(state)
    assert set(state) == names


def test_the_state_of_another_schedule_is_refused_and_nothing_changes():
    other = SnapshotLR(sgd(), CosineCycles(0.1, 48, 3))
    other.last_epoch = 7
    scheduler = SnapshotLR(sgd(), CYCLES)
    with pytest.raises(ScheduleError, match=r"steps=48.*steps=24"):
        scheduler.load_state_dict(other.state_dict())
    assert scheduler.last_epoch == 0


def test_groups_keep_their_ratio_and_the_floor_scales_with_it():
    """With one eta_min for all groups, warm restarts raise the rate of a small group."""
    schedule = CosineCycles(0.1, 20, 2, lr_min=0.05)
    optimizer, peer = sgd(0.1, 0.01), sgd(0.1, 0.01)
    rates = rates_of(optimizer, SnapshotLR(optimizer, schedule), 20)
    theirs = rates_of(peer, CosineAnnealingWarmRestarts(peer, 10, eta_min=0.05), 20)
    assert max(small for _, small in theirs) > 0.04
    assert all(small == pytest.approx(large / 10, rel=1e-12) for large, small in rates)
    assert max(small for _, small in rates) == pytest.approx(0.01)
    assert min(small for _, small in rates) >= 0.005


@pytest.mark.parametrize(
    ("default", "groups", "ratios"),
    [
        (0.1, (None,), [1]),
        (0.1, (None, 0.01), [1, 0.1]),
        (0.1, (None, 1.0), [1, 10]),  # the default's group is the reference, though another is larger
        (0.5, (0.2, 0.1), [1, 0.5]),  # no group started with the default: the largest is
        (0.0, (0.2, 0.05), [1, 0.25]),
    ],
)
def test_the_reference_is_the_default_rate_if_some_group_has_it_else_the_largest(default, groups, ratios):
    assert GroupRates(sgd(*groups, lr=default)).ratios == pytest.approx(ratios)


def test_a_given_reference_comes_before_any_other():
    optimizer = sgd(None, 0.01)
    SnapshotLR(optimizer, CYCLES, reference_lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005])


def test_the_rates_that_count_are_those_before_another_scheduler_changed_them():
    optimizer = sgd(None, 1.0)
    LinearLR(optimizer, start_factor=0.1)
    assert GroupRates(optimizer).ratios == [1, 10]


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_an_optimizer_whose_rates_are_all_zero_is_refused(lr):
    with pytest.raises(ScheduleError, match=r"above 0, got 0\.0.*usual rates"):
        SnapshotLR(sgd(lr=lr), CYCLES)


@pytest.mark.parametrize("reference", [0.0, -1.0, math.nan])
def test_a_reference_that_is_no_rate_is_refused(reference):
    with pytest.raises(ScheduleError, match="reference_lr"):
        SnapshotLR(sgd(), CYCLES, reference_lr=reference)


def test_a_rate_that_is_a_tensor_is_filled_in_place():
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = sgd(lr=rate)
    scheduler = SnapshotLR(optimizer, CYCLES)
    assert rates_of(optimizer, scheduler, 24) == [[CYCLES(step)] for step in range(24)]
    assert optimizer.param_groups[0]["lr"] is rate
    GroupRates(optimizer).apply(0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5


def test_a_rate_that_is_a_number_stays_one_for_optimizers_that_need_it():
    """TorchEnsemble makes the rate a tensor, which breaks Adam(foreach=True)."""
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=0.1, foreach=True)
    scheduler = SnapshotLR(optimizer, CYCLES)
    for _ in range(30):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert type(optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize("asked", [True, False], ids=["with extend()", "by itself"])
def test_a_group_added_later_is_taken_in_at_its_ratio(asked):
    optimizer = sgd()
    scheduler = SnapshotLR(optimizer, CYCLES)
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.02})
    if asked:
        scheduler.extend()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [CYCLES(1), CYCLES(1) * (0.02 / 0.1)]
    assert scheduler.base_lrs == [0.1, 0.02]


def test_a_group_that_is_gone_is_refused():
    optimizer = sgd(None, 0.02)
    scheduler = SnapshotLR(optimizer, CYCLES)
    optimizer.step()
    del optimizer.param_groups[0]
    with pytest.raises(ScheduleError, match="has 1 parameter groups and had 2: groups cannot be removed"):
        scheduler.step()
