"""The whole ensemble under `torch.compile` gives what it gives without, in one graph once a first batch was checked.

Traced without Inductor, whose compiler takes a minute: what may break is what is traced.
"""

import pytest
import torch
from torch import nn

from snapcore import DataError
from snapcore.ensemble import Recipe
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.models import cnn

X = torch.linspace(-2, 2, 30).view(10, 3)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.into, self.out, self.back = nn.Linear(3, 4, bias=False), nn.Linear(4, 3), nn.Linear(3, 4, bias=False)
        self.back.weight = self.into.weight

    def forward(self, x):
        return self.back(self.out(self.into(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x.unsqueeze(1))[0][:, -1])


def three(make):
    torch.manual_seed(0)
    return [make() for _ in range(3)]


def normalised():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("strategy", ["loop", "stacked"])
@pytest.mark.parametrize("make", [normalised, Tied])
def test_a_first_call_is_checked_and_right_and_the_next_is_one_graph(make, strategy):
    models = three(make)
    wanted = SnapshotEnsemble(models)(X)
    compiled = torch.compile(SnapshotEnsemble(models, strategy=strategy), backend="aot_eager")
    torch.testing.assert_close(compiled(X), wanted, atol=1e-5, rtol=0)
    explained = torch._dynamo.explain(compiled._orig_mod)(X)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch.testing.assert_close(compiled(-X), SnapshotEnsemble(models)(-X), atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", ["loop", "stacked"])
def test_images_with_a_recipe_are_one_graph_after_a_plain_call(strategy):
    models, x = three(lambda: cnn((1, 8, 8), 10)), torch.randn(4, 1, 8, 8)
    ensemble = SnapshotEnsemble(models, strategy=strategy, recipe=Recipe((1, 2, 3), temperature=2.0))
    wanted = ensemble(x)
    compiled = torch.compile(ensemble, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted, atol=1e-5, rtol=0)


def test_under_autocast_the_loop_is_compiled_as_it_runs_and_stacked_members_stay_refused():
    models = three(normalised)
    loop, stacked = SnapshotEnsemble(models), SnapshotEnsemble(models, strategy="stacked")
    plain = [loop(X), stacked(X)][0]
    compiled = torch.compile(loop, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = compiled(X), loop(X)
        with pytest.raises(DataError, match="leave autocast out in part"):
            torch.compile(stacked, backend="eager")(X)
    assert not torch.equal(wanted, plain)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_recurrent_layers_are_compiled_by_the_loop_and_stay_refused_when_stacked():
    models = three(Recurrent)
    wanted = SnapshotEnsemble(models)(X)
    torch.testing.assert_close(torch.compile(SnapshotEnsemble(models), backend="eager")(X), wanted)
    with pytest.raises(DataError, match=r"LSTM, for which torch\.vmap has no rule"):
        torch.compile(SnapshotEnsemble(models, strategy="stacked"), backend="eager")(X)


def test_a_compiled_first_call_refuses_what_a_plain_one_refuses():
    models = three(lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)))
    with pytest.raises(DataError, match="activation='identity'"):
        torch.compile(SnapshotEnsemble(models), backend="eager")(X)
