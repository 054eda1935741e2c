"""The verbs of the PyTorch backend, and every method run through them on digits."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from snapcore import METHODS, CycleWarning, DataError, DivergedError, program
from snapcore.metrics import score
from snapcore.run import execute
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.backend import TorchBackend
from snapcore_torch.models import mlp

BACKEND = TorchBackend()
SNAPSHOT = program("snapshot", lr=0.1, steps=48, cycles=3)


def silent(step, loss):
    pass


def weights(state):
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def start(data, model="cnn", seed=0, **options):
    return BACKEND.init(model, data, SNAPSHOT, seed=seed, device="cpu", **options)


def run(method, data, directory, seed=0, **options):
    what = program(method, lr=0.1, steps=48, cycles=3)
    execute(what, BACKEND, model="mlp", data=data, directory=directory, seed=seed, device="cpu", **options)
    return what


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_leaves_its_members_and_an_ensemble(method, digits, held_out, tmp_path):
    reports = []
    what = run(method, digits, tmp_path, report=lambda step, _: reports.append(step))
    store = SnapshotStore(tmp_path)
    assert [member.step for member in store.members] == list(what.schedule.snapshot_steps)
    assert [member.lr for member in store.members] == [what.schedule(member.step - 1) for member in store.members]
    assert reports == list(range(1, what.updates + 1))
    assert store.stopped == "finished"

    x, labels = held_out
    ensemble = SnapshotEnsemble.load(tmp_path, mlp((1, 8, 8), 10))
    scores = [score(member.numpy(), labels) for member in ensemble.members(torch.tensor(x))]
    together = score(ensemble(torch.tensor(x)).numpy(), labels)
    assert together["nll"] <= sum(alone["nll"] for alone in scores) / len(scores)
    assert together["error"] < 60  # 90 is chance; a member has 16 updates


def test_the_same_seed_gives_the_same_members_and_another_seed_others(digits, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("snapshot", digits, tmp_path / name, seed=seed)
    a, b, c = ([SnapshotStore(tmp_path / name).load(k) for k in (1, 2, 3)] for name in "abc")
    assert all(same(one, other) for one, other in zip(a, b, strict=True))
    assert not same(a[2], c[2])


def test_fresh_weights_come_from_the_seed_and_the_members_number_alone(digits):
    first = weights(start(digits, seed=5, member=3))
    torch.manual_seed(99)
    torch.randn(7)
    assert same(weights(start(digits, seed=5, member=3)), first)
    assert not same(weights(start(digits, seed=5, member=2)), first)
    assert not same(weights(start(digits, seed=6, member=3)), first)


def test_independent_members_begin_with_the_fresh_weights_of_their_number(digits, tmp_path):
    """A member of `independent` is a run of its own: the same weights, batches and rates from its start on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CycleWarning)
        what = program("independent", lr=0.1, steps=5, cycles=3)
    execute(what, BACKEND, model="mlp", data=digits, directory=tmp_path, seed=4, device="cpu")
    for member in (1, 2, 3):
        alone = BACKEND.init("mlp", digits, what, seed=4, member=member, device="cpu")
        alone = BACKEND.train(alone, 5 * (member - 1), 5 * member, report=silent)
        assert same(SnapshotStore(tmp_path).load(member), weights(alone))


def test_the_callers_random_state_is_left_alone(digits):
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    start(digits)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_capture_survives_later_updates(digits):
    state = BACKEND.train(start(digits), 0, 3, report=silent)
    expected, pending = weights(state), BACKEND.capture(state)
    state = BACKEND.train(state, 3, 6, report=silent)
    assert same(pending.resolve(), expected)
    assert not same(weights(state), expected)


@pytest.mark.parametrize(("moments", "left"), [("keep", True), ("reset", False)])
def test_restoring_brings_weights_and_statistics_back(digits, moments, left):
    state = BACKEND.train(start(digits), 0, 3, report=silent)
    tensors, expected = BACKEND.capture(state).resolve(), weights(state)
    state = BACKEND.train(state, 3, 6, report=silent)
    state = BACKEND.restore(state, tensors, optimizer=moments)
    assert same(weights(state), expected)
    assert bool(state.optimizer.state) is left


def test_restoring_nothing_may_still_reset_the_moments(digits):
    state = BACKEND.train(start(digits), 0, 3, report=silent)
    expected = weights(state)
    state = BACKEND.restore(state, None, optimizer="reset")
    assert same(weights(state), expected)
    assert not state.optimizer.state


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_of_evaluation_and_leave_the_state_alone(digits, held_out, training):
    state = BACKEND.train(start(digits), 0, 3, report=silent)
    state.model.train(training)
    before, generator = weights(state), torch.get_rng_state()
    found = BACKEND.logits(state, held_out[0])
    assert (found.dtype, found.shape) == (np.float32, (797, 10))
    assert same(weights(state), before)
    assert state.model.training is training
    assert torch.equal(torch.get_rng_state(), generator)
    expected = state.model.eval()(torch.tensor(held_out[0])).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_logits_of_many_examples_are_those_of_each(digits):
    state = start(digits, "mlp")
    x = np.concatenate([digits.x] * 3)[:2500]
    x.flags.writeable = False
    found = BACKEND.logits(state, x)
    np.testing.assert_allclose(found[1000:2000], BACKEND.logits(state, digits.x), atol=1e-5)
    assert BACKEND.logits(state, x[:0]).shape == (0, 10)


def test_training_continues_after_logits_as_if_they_had_not_been_asked_for(digits, held_out):
    plain = BACKEND.train(start(digits), 0, 6, report=silent)
    asked = BACKEND.train(start(digits), 0, 3, report=silent)
    BACKEND.logits(asked, held_out[0])
    asked = BACKEND.train(asked, 3, 6, report=silent)
    assert same(weights(asked), weights(plain))


def test_bfloat16_runs_and_its_members_are_float32(digits, tmp_path):
    run("snapshot", digits, tmp_path, precision="bfloat16")
    assert {array.dtype for array in SnapshotStore(tmp_path).load(3).values()} == {np.dtype(np.float32)}


class Exploding(nn.Module):
    """Logits that leave the finite numbers at the given update."""

    def __init__(self, at):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.at, self.updates = at, 0

    def forward(self, x):
        self.updates += 1
        return self.linear(x.flatten(1)) * (math.nan if self.updates == self.at else 1)


@pytest.mark.parametrize(("at", "kept"), [(1, 0), (13, 0), (23, 1), (32, 1), (48, 2)])
def test_a_loss_that_is_not_finite_names_its_update_and_keeps_the_members_before(digits, tmp_path, at, kept):
    with pytest.raises(DivergedError, match=rf"the loss of update {at} is nan"):
        execute(
            SNAPSHOT, BACKEND, model=lambda *_: Exploding(at), data=digits, directory=tmp_path, seed=0, device="cpu"
        )
    store = SnapshotStore(tmp_path)
    assert len(store.members) == kept
    assert store.stopped is None
    store.verify()


def test_metrics_are_asked_of_the_very_state_that_is_captured(digits, held_out, tmp_path):
    def metrics(snapshot, state):
        return score(torch.tensor(BACKEND.logits(state, held_out[0])).softmax(-1).numpy(), held_out[1])

    run("snapshot", digits, tmp_path, metrics=metrics)
    ensemble = SnapshotEnsemble.load(tmp_path, mlp((1, 8, 8), 10))
    scores = [score(member.numpy(), held_out[1]) for member in ensemble.members(torch.tensor(held_out[0]))]
    for member, found in zip(SnapshotStore(tmp_path).members, scores, strict=True):
        assert member.metrics["nll"] == pytest.approx(found["nll"], rel=1e-4)


def test_a_model_may_be_a_function_of_the_input_shape_and_the_number_of_classes(digits):
    asked = []

    def model(shape, n_classes):
        asked.append((shape, n_classes))
        return mlp(shape, n_classes)

    start(digits, model)
    assert asked == [((1, 8, 8), 10)]


def test_a_model_that_there_is_not_is_refused_with_those_there_are(digits):
    with pytest.raises(DataError, match=r"model must be one of \['cnn', 'fcn', 'mlp'\] or a function.*got 'resnet'"):
        start(digits, "resnet")


def test_the_optimizer_is_the_papers_by_default(digits):
    state = start(digits)
    (group,) = state.optimizer.param_groups
    assert isinstance(state.optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.9, True, 1e-4)


def test_another_optimizer_keeps_the_ratio_of_its_groups(digits):
    def optimizer(module):
        groups = [{"params": module[1].parameters()}, {"params": module[3].parameters(), "lr": 1e-4}]
        return torch.optim.Adam(groups, lr=1e-3, foreach=True)

    state = BACKEND.train(start(digits, "mlp", optimizer=optimizer), 0, 9, report=silent)
    rates = [group["lr"] for group in state.optimizer.param_groups]
    assert rates == pytest.approx([SNAPSHOT.schedule(8), SNAPSHOT.schedule(8) / 10])
