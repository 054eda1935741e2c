"""A recorded graph gives what the loop gives, for every shape, and is refused where it cannot be.

There is no CUDA here, so what records is a stand-in with the same rule: it reads the inputs that it was given once, and
its output is overwritten by the next replay. The recording itself is tested by `make gpu`.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from snapcore import DataError
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.graphs import KEPT, Graphs


class Recording:
    """What was recorded, on the CPU: it has no arguments, and one output that stays where it is."""

    made = 0

    def __init__(self, run, device):
        assert device == torch.device("cpu")
        Recording.made += 1
        self._run, self.output = run, run().clone()
        self.output.fill_(torch.nan)  # recording computes nothing

    def replay(self):
        self.output.copy_(self._run())


@pytest.fixture(autouse=True)
def none_made():
    Recording.made = 0


def members(count=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [nn.Linear(3, 4) for _ in range(count)]


def graphed(models, **options):
    ensemble = SnapshotEnsemble(models, strategy="graph", **options)
    ensemble._graphs = Graphs(Recording, "cpu")
    return ensemble


def batch(rows, seed=0):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("log", [False, True])
def test_each_call_gives_what_the_loop_gives_for_its_own_inputs(log):
    ensemble, loop = graphed(members()), SnapshotEnsemble(members())
    results = [ensemble(batch(5, seed), log=log) for seed in range(4)]
    for seed, found in enumerate(results):  # after all of them: a result is not the next one's
        torch.testing.assert_close(found, loop(batch(5, seed), log=log))
    assert Recording.made == 1


def test_a_graph_is_recorded_for_each_shape_and_type_and_plain_value():
    class Scaled(nn.Linear):
        def forward(self, x, *, scale=1.0, parts=()):
            return super().forward(x.float()) * scale + sum(parts)

    torch.manual_seed(0)
    models = [Scaled(3, 4) for _ in range(2)]
    ensemble, loop = graphed(models), SnapshotEnsemble(models)
    calls = [
        ((batch(5),), {}),
        ((batch(2),), {}),
        ((batch(5).double(),), {}),
        ((batch(5),), {"scale": 2.0}),
        ((batch(5),), {"scale": 2.0, "parts": [torch.ones(4)]}),
    ]
    ensemble(batch(5))  # the first batch is the loop's
    for number, (args, kwargs) in enumerate(calls, 1):
        for _ in range(2):
            torch.testing.assert_close(ensemble(*args, **kwargs), loop(*args, **kwargs))
        assert Recording.made == number


def test_only_so_many_graphs_are_kept_and_the_one_not_used_for_longest_goes():
    ensemble = graphed(members())
    ensemble(batch(1))
    for rows in range(1, KEPT + 1):
        ensemble(batch(rows))
    ensemble(batch(1))
    assert Recording.made == KEPT
    ensemble(batch(KEPT + 1))  # in the place of 2
    ensemble(batch(1))
    assert Recording.made == KEPT + 1
    ensemble(batch(2))
    assert Recording.made == KEPT + 2


def test_autocast_is_recorded_apart():
    ensemble, loop = graphed(members()), SnapshotEnsemble(members())
    for _ in range(2):
        plain = ensemble(batch(5))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ensemble(batch(5)), loop(batch(5)))
        assert not torch.equal(ensemble(batch(5)), plain)
    torch.testing.assert_close(ensemble(batch(5)), plain, rtol=0, atol=0)


def test_a_graph_of_inference_mode_serves_outside_of_it():
    ensemble, loop = graphed(members()), SnapshotEnsemble(members())
    with torch.inference_mode():
        for seed in range(2):
            ensemble(batch(5, seed))
    torch.testing.assert_close(ensemble(batch(5, 7)), loop(batch(5, 7)))
    assert Recording.made == 1


def test_weights_that_come_later_are_the_ones_that_count():
    ensemble, other = graphed(members()), SnapshotEnsemble(members(6)[3:])
    for _ in range(2):
        ensemble(batch(5))
    ensemble.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(ensemble(batch(5)), other(batch(5)))
    torch.testing.assert_close(ensemble.double()(batch(5).double()), other.double()(batch(5).double()))


def test_before_a_graph_is_recorded_the_first_batch_is_checked():
    alike = graphed([nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)) for _ in range(2)])
    with pytest.raises(DataError, match="activation='identity'"):
        alike(batch(5))
    assert not Recording.made


def test_a_model_that_counts_its_calls_is_found_out():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x) * Counting.calls

    ensemble = graphed([Counting(3, 4) for _ in range(2)], allow_equal=True, activation="identity")
    with pytest.raises(
        DataError, match=r"^a replayed graph gives something else than the loop, by .* strategy='loop'$"
    ):
        ensemble(batch(5))


def test_without_cuda_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ensemble = SnapshotEnsemble(members(), strategy="graph")
    with pytest.raises(
        DataError, match=r"^strategy 'graph' needs a CUDA device, and PyTorch finds none: use strategy='loop'$"
    ):
        ensemble(batch(5))


def test_inputs_elsewhere_are_refused_naming_where_they_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ensemble = SnapshotEnsemble(members(), strategy="graph")
    with pytest.raises(DataError, match=r"^strategy 'graph' needs all inputs on one CUDA device, got cpu: use"):
        ensemble(batch(5))
    with pytest.raises(DataError, match=r"got cpu and meta: use"):
        ensemble(batch(5), batch(5).to("meta"))
    with pytest.raises(DataError, match=r"got no tensor: use"):
        ensemble()


def test_what_might_hold_tensors_is_refused_by_its_type():
    class Held:
        pass

    ensemble = graphed(members(), allow_equal=True, activation="identity")
    with pytest.raises(DataError, match=r"takes tensors and plain values, .* got Held: pass the tensors that it holds"):
        ensemble(batch(5), held=Held())


def test_gradients_are_refused_where_they_are_wanted():
    ensemble, x = graphed(members()), batch(5).requires_grad_()
    with pytest.raises(DataError, match=r"no gradients: call it under torch.no_grad\(\), or use strategy='loop'"):
        ensemble(x)
    with torch.no_grad():
        torch.testing.assert_close(ensemble(x), SnapshotEnsemble(members())(x))


def test_what_cannot_be_recorded_is_refused_with_the_reason_and_what_cannot_be_run_fails_as_in_the_loop():
    def fail(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    ensemble = SnapshotEnsemble(members(), strategy="graph", allow_equal=True, activation="identity")
    ensemble._graphs = Graphs(fail, "cpu")
    with pytest.raises(DataError, match=r"^the ensemble cannot be recorded as a CUDA graph: operation not permitted"):
        ensemble(batch(5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as failure:
        ensemble(torch.ones(2, 5))
    assert not isinstance(failure.value, DataError)


def test_tune_measures_graphs_too_and_forgets_those_it_does_not_keep():
    ensemble, before = SnapshotEnsemble(members()), SnapshotEnsemble(members())(batch(5))
    assert "CUDA" in ensemble.tune(batch(5), rounds=1)["graph"].refused
    ensemble._graphs = Graphs(Recording, "cpu")
    report = ensemble.tune(batch(5), rounds=2)
    assert report["graph"].refused is None
    assert report["graph"].deviation <= 1e-6
    assert bool(ensemble._graphs._kept) == (report.chosen == "graph")
    torch.testing.assert_close(ensemble(batch(5)), before)


def test_copies_and_pickles_hold_no_graph():
    ensemble = SnapshotEnsemble(members(), strategy="graph")
    ensemble._graphs._kept["some"] = (lambda: None, None)  # which cannot be pickled
    for again in (pickle.loads(pickle.dumps(ensemble)), copy.deepcopy(ensemble)):
        assert again.strategy == "graph"
        assert not again._graphs._kept


def test_members_and_what_is_compiled_come_from_the_loop():
    ensemble, loop = graphed(members()), SnapshotEnsemble(members())
    torch.testing.assert_close(ensemble.members(batch(5)), loop.members(batch(5)))
    torch.testing.assert_close(torch.compile(ensemble, backend="eager")(batch(5)), loop(batch(5)))
    assert not Recording.made
