"""What happens between members: other weights, and the optimizer's moments kept or reset."""

import pytest
import torch
from torch import nn

from snapcore import CosineCycles, DataError, Program, ProtocolError, Restart, program
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotRun

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)


def make():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def values(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def starts(directory, what, model, optimizer, **options):
    """Train to the end; return the weights that each member's training began with, and its number of moments."""
    found = [(values(model), len(optimizer.state))]
    with SnapshotRun(directory, what, model, optimizer, **options) as run:
        while not run.finished:
            optimizer.zero_grad()
            model(torch.randn(6, 3)).square().mean().backward()
            optimizer.step()
            run.step()
            if run.updates % 4 == 0 and not run.finished:
                found.append((values(model), len(optimizer.state)))
    return found


def member(directory, index):
    return {name: array.tolist() for name, array in SnapshotStore(directory).load(index).items()}


def test_without_a_restart_a_member_starts_from_the_one_before_with_its_momentum(tmp_path):
    model = make()
    begun = starts(tmp_path / "run", CYCLES, model, sgd(model))
    assert begun[1:] == [(member(tmp_path / "run", 1), 6), (member(tmp_path / "run", 2), 6)]


@pytest.mark.parametrize(("moments", "left"), [("keep", 6), ("reset", 0)])
def test_a_restart_from_the_first_brings_its_weights_and_buffers_back(tmp_path, moments, left):
    """Users ask for the choice to reset the optimizer or to keep it: nobody offers it."""
    model = make()
    begun = starts(tmp_path / "run", Program("mine", CYCLES, Restart("first", moments)), model, sgd(model))
    assert begun[1:] == [(member(tmp_path / "run", 1), left)] * 2


def test_star_restarts_from_the_first_with_new_moments(tmp_path):
    model = make()
    begun = starts(tmp_path / "run", program("star", lr=0.1, steps=12, cycles=3), model, sgd(model))
    assert begun[1:] == [(member(tmp_path / "run", 1), 0)] * 2


@pytest.mark.parametrize("as_module", [True, False])
def test_fresh_weights_come_from_init_by_the_members_number(tmp_path, as_module):
    fresh, asked = {number: make() for number in (2, 3)}, []

    def init(number):
        asked.append(number)
        return fresh[number] if as_module else fresh[number].state_dict()

    model = make()
    what = program("singlecycle", lr=0.1, steps=12, cycles=3)
    begun = starts(tmp_path / "run", what, model, sgd(model), init=init)
    assert begun[1:] == [(values(fresh[2]), 0), (values(fresh[3]), 0)]
    assert asked == [2, 3]


def test_fresh_weights_stay_as_they_were_given(tmp_path):
    given, model = make(), make()
    before = values(given)
    what = program("singlecycle", lr=0.1, steps=12, cycles=3)
    starts(tmp_path / "run", what, model, sgd(model), init=lambda _: given)
    assert values(given) == before


def test_a_reset_keeps_the_count_of_updates_and_the_rate(tmp_path):
    model = make()
    optimizer, rates = sgd(model), []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    starts(tmp_path / "run", program("star", lr=0.1, steps=12, cycles=3), model, optimizer)
    assert rates == [CYCLES(step) for step in range(12)]


@pytest.mark.parametrize("method", ["singlecycle", "independent"])
def test_a_program_with_fresh_weights_and_no_init_is_refused_before_anything_is_written(tmp_path, method):
    model = make()
    with pytest.raises(ProtocolError, match=f"{method} starts members from fresh weights: pass init="):
        SnapshotRun(tmp_path / "run", program(method, lr=0.1, steps=12, cycles=3), model, sgd(model))
    assert not (tmp_path / "run").exists()


def test_fresh_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    model = make()
    what = program("singlecycle", lr=0.1, steps=12, cycles=3)
    with pytest.raises(DataError, match=r"a restart's member does not fit the model .*'0.weight' \(4, 3\) is missing"):
        starts(tmp_path / "run", what, model, sgd(model), init=lambda _: nn.Linear(3, 1))
    assert len(SnapshotStore(tmp_path / "run").members) == 1
