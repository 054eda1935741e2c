"""Fresh weights between members, in the forms that PyTorch has for them; the rest is in the conformance suite."""

import pytest
import torch
from torch import nn

from snapcore import DataError, program
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotRun

PLAN = program("singlecycle", lr=0.1, steps=12, cycles=3)


def make():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def values(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def starts(directory, init):
    """Train to the end; return the weights that the members after the first began with."""
    model, found = make(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with SnapshotRun(directory, PLAN, model, optimizer, init=init) as run:
        while not run.finished:
            optimizer.zero_grad()
            model(torch.randn(6, 3)).square().mean().backward()
            optimizer.step()
            run.step()
            if run.updates in (4, 8):
                found.append(values(model))
    return found


@pytest.mark.parametrize("as_module", [True, False])
def test_fresh_weights_are_a_module_or_a_state_dict_and_stay_as_they_were_given(tmp_path, as_module):
    fresh = {number: make() for number in (2, 3)}
    before = [values(module) for module in fresh.values()]
    begun = starts(tmp_path / "run", lambda number: fresh[number] if as_module else fresh[number].state_dict())
    assert begun == [values(module) for module in fresh.values()] == before


def test_fresh_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"a restart's member does not fit the model .*'0.weight' \(4, 3\) is missing"):
        starts(tmp_path / "run", lambda number: nn.Linear(3, 1))
    assert len(SnapshotStore(tmp_path / "run").members) == 1
