"""Who else may set a rate, or add parameters, while a run does: it is said once, and recorded as it was."""

import math
import warnings

import pytest
import torch
from torch import nn

from snapcore import CosineCycles, CycleWarning
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotLR, SnapshotRun

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(6, 3)).square().mean().backward()
    optimizer.step()


def train(directory, optimizer, model, before=lambda k: None, between=lambda k: None, after=lambda k: None):
    """Return the warnings given, and the rates used according to a hook of the test's own."""
    used = []
    optimizer.register_step_pre_hook(lambda *_: used.append(float(optimizer.param_groups[0]["lr"])))
    with warnings.catch_warnings(record=True) as given, SnapshotRun(directory, CYCLES, model, optimizer) as run:
        warnings.simplefilter("always")
        for k in range(12):
            before(k)
            update(model, optimizer)
            between(k)
            run.step()
            after(k)
    return [each for each in given if each.category is CycleWarning], used


def recorded(directory):
    return [taken.lr for taken in SnapshotStore(directory).members]


def rate(number, *, tensor):
    return torch.tensor(number) if tensor else number


@pytest.mark.parametrize("tensor", [False, True])
def test_a_loop_that_sets_its_own_rate_is_warned_of_once_and_members_record_that_rate(tmp_path, tensor):
    model = nn.Linear(3, 2)
    optimizer = sgd(model, lr=rate(0.1, tensor=tensor))

    def own(k):
        optimizer.param_groups[0]["lr"] = rate(0.05 * (1 + math.cos(math.pi * k / 12)), tensor=tensor)

    given, used = train(tmp_path, optimizer, model, before=own)
    assert [str(each.message).split(":")[0] for each in given] == [
        f"update 2 was done at the rate {used[1]:.6g}, and the schedule's is {CYCLES(1):.6g}"
    ]
    assert given[0].filename == __file__
    assert recorded(tmp_path) == pytest.approx([used[3], used[7], used[11]])


@pytest.mark.parametrize("tensor", [False, True])
def test_a_rate_written_into_its_tensor_is_noticed_too(tmp_path, tensor):
    model = nn.Linear(3, 2)
    optimizer = sgd(model, lr=rate(0.1, tensor=tensor))

    def own(k):
        group = optimizer.param_groups[0]
        if k == 7 and tensor:
            group["lr"].mul_(0.5)
        elif k == 7:
            group["lr"] *= 0.5

    given, _ = train(tmp_path, optimizer, model, before=own)
    assert len(given) == 1
    assert recorded(tmp_path) == pytest.approx([CYCLES(3), CYCLES(7) / 2, CYCLES(11)])


def test_a_scheduler_left_in_the_loop_is_named(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    given, used = train(tmp_path, optimizer, model, after=lambda k: scheduler.step())
    assert len(given) == 1
    assert "a scheduler beside the run sets it" in str(given[0].message)
    assert recorded(tmp_path) == pytest.approx([used[3], used[7], used[11]])


def test_a_plateau_scheduler_is_warned_of_when_it_lowers_the_rate(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    given, used = train(tmp_path, optimizer, model, after=lambda k: k % 4 == 2 and scheduler.step(1.0))
    assert len(given) == 1
    assert used[7] == pytest.approx(CYCLES(7) / 10)
    assert recorded(tmp_path) == pytest.approx([CYCLES(3), CYCLES(7) / 10, CYCLES(11) / 10])


@pytest.mark.parametrize("ours", [True, False])
def test_a_scheduler_stepped_before_the_run_changes_nothing_and_is_not_warned_of(tmp_path, ours):
    """The Trainer of transformers steps its own in between."""
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    scheduler = SnapshotLR(optimizer, CYCLES) if ours else torch.optim.lr_scheduler.StepLR(optimizer, 3)
    given, used = train(tmp_path, optimizer, model, between=lambda k: scheduler.step())
    assert given == []
    assert used == [CYCLES(k) for k in range(12)]
    assert recorded(tmp_path) == [CYCLES(k) for k in (3, 7, 11)]


def test_in_terms_of_the_schedule_a_group_counts_by_its_ratio(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.01}], lr=0.1)

    def own(k):
        optimizer.param_groups[1]["lr"] = 0.005

    given, _ = train(tmp_path, optimizer, model, before=own)
    assert len(given) == 1
    assert recorded(tmp_path) == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("default", [True, False])
def test_a_group_added_by_the_loop_has_its_ratio_in_the_very_next_update(tmp_path, default):
    body, head = nn.Linear(3, 3), nn.Linear(3, 2)
    model, rates = nn.Sequential(body, head), []
    optimizer = sgd(head)
    optimizer.register_step_post_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))

    def add(k):
        if k == 5:
            optimizer.add_param_group({"params": list(body.parameters()), **({} if default else {"lr": 0.02})})

    given, _ = train(tmp_path, optimizer, model, before=add)
    share = 1 if default else 0.2
    assert given == []
    assert [len(each) for each in rates] == [1] * 5 + [2] * 7
    assert [each[1] for each in rates[5:]] == pytest.approx([share * CYCLES(k) for k in range(5, 12)])


def test_added_parameters_are_members_and_resume_with_the_optimizer_as_it_was_then(tmp_path):
    def train(until, added):
        torch.manual_seed(2)
        body, head = nn.Linear(3, 3), nn.Linear(3, 2)
        model, optimizer = nn.Sequential(body, head), sgd(head, momentum=0.9)
        if added:
            optimizer.add_param_group({"params": list(body.parameters()), "lr": 0.02})
        with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
            while run.updates < until:
                if run.updates == 2:
                    optimizer.add_param_group({"params": list(body.parameters()), "lr": 0.02})
                update(model, optimizer)
                run.step()
        return [group["lr"] for group in optimizer.param_groups]

    train(5, added=False)
    assert train(7, added=True) == pytest.approx([CYCLES(7), 0.2 * CYCLES(7)])
