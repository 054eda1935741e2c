"""Members spread over several devices give what they give on one, in their order.

The CPU is one device, so tensors that count their moves stand in for a second; `make gpu` spreads members for good.
"""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

from snapcore import DataError
from snapcore.ensemble import Cascade, Recipe
from snapcore_torch import SnapshotEnsemble


def members(count=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [nn.Linear(3, 4) for _ in range(count)]


X = torch.linspace(-2, 2, 15).view(5, 3)


class Moving(torch.Tensor):
    """A tensor that keeps a list of where it, and what is computed from it, is moved."""

    moves: ClassVar = []

    def to(self, *args, **kwargs):
        Moving.moves.append(args[0])
        return super().to(*args, **kwargs)


@pytest.mark.parametrize("strategy", ["loop", "stacked"])
def test_spread_members_give_what_they_give_on_one_device(strategy):
    recipe = Recipe((1, 2, 3), temperature=2.0)
    ensemble = SnapshotEnsemble(members(), recipe=recipe, strategy=strategy).spread(["cpu", "cpu"])
    plain = SnapshotEnsemble(members(), recipe=recipe)
    for found, wanted in (
        (ensemble(X), plain(X)),
        (ensemble(X, log=True), plain(X, log=True)),
        (ensemble.members(X), plain.members(X)),
        (torch.from_numpy(ensemble.predict([X, X])), torch.from_numpy(plain.predict([X, X]))),
    ):
        torch.testing.assert_close(found, wanted)


def test_members_are_moved_in_turn_and_to_brings_them_together():
    ensemble = SnapshotEnsemble(members(5)).spread(["cpu", torch.device("meta")])
    assert [model.weight.device.type for model in ensemble.models] == ["cpu", "meta", "cpu", "meta", "cpu"]
    assert [next(one.parameters()).device.type for one in ensemble] == ["cpu", "meta", "cpu", "meta", "cpu"]
    ensemble.to("meta")
    assert {parameter.device.type for parameter in ensemble.parameters()} == {"meta"}
    assert ensemble._devices is None


def test_inputs_go_to_each_device_once_and_results_to_the_first():
    ensemble = SnapshotEnsemble(members(), activation="identity", allow_equal=True)
    ensemble._devices = [torch.device(place) for place in ("cpu", "cpu:1", "cpu")]  # a tensor says "cpu" of both
    Moving.moves = []
    ensemble(X.as_subclass(Moving))
    assert list(map(str, Moving.moves)) == ["cpu", "cpu:1", "cpu", "cpu", "cpu"]


def test_all_members_are_begun_before_the_first_result_is_pooled():
    models, events = members(), []
    for number, model in enumerate(models):
        model.register_forward_hook(lambda *_, number=number: events.append(number))

    def activation(outputs):
        events.append("pooled")
        return outputs

    SnapshotEnsemble(models, activation=activation, allow_equal=True).spread(["cpu", "cpu"])(X)
    assert events == [0, 1, 2, "pooled", "pooled", "pooled"]


def test_a_cascade_asks_each_member_where_it_is():
    recipe = Recipe((1, 1, 1), cascade=Cascade("probability", 0.5, (1.0, 1.0, 1.0)))
    plain, ensemble = (SnapshotEnsemble(members(), recipe=recipe) for _ in range(2))
    ensemble._devices = [torch.device(place) for place in ("cpu", "cpu:1", "cpu:2")]
    Moving.moves = []
    found, used = ensemble.cascade(X.as_subclass(Moving), return_used=True)
    assert str(Moving.moves[0]) == "cpu:2"  # the last member is asked first
    torch.testing.assert_close(found, plain.cascade(X))
    assert used.max() > 1


def test_equal_members_are_noticed_across_devices():
    same = nn.Linear(3, 4)
    hidden = [copy.deepcopy(same) for _ in range(2)]
    hidden[1].register_buffer("other", torch.ones(1))
    with pytest.raises(DataError, match="allow_equal=True"):
        SnapshotEnsemble(hidden).spread(["cpu", "cpu"])(X)


def test_it_pickles_spread():
    ensemble = SnapshotEnsemble(members()).spread(["cpu", "cpu"])
    again = pickle.loads(pickle.dumps(ensemble))
    torch.testing.assert_close(again(X), ensemble(X))
    assert again._devices == ensemble._devices


def test_a_graph_of_spread_members_and_no_device_at_all_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ensemble = SnapshotEnsemble(members(), strategy="graph", activation="identity", allow_equal=True)
    ensemble._graphs._device_type = "cpu"
    ensemble._devices = [torch.device(place) for place in ("cpu", "cpu:1", "cpu")]
    with pytest.raises(DataError, match="needs its members on one device, but they are spread"):
        ensemble(X)
    with pytest.raises(DataError, match=r"devices must name at least one, such as .* got none: use to\(device\)"):
        ensemble.spread([])
