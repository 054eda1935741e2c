"""The verbs of the JAX backend, and every method run through them on digits."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from snapcore import METHODS, CycleWarning, DataError, DivergedError, program
from snapcore.data import TrainingData
from snapcore.ensemble import combine
from snapcore.metrics import score
from snapcore.run import execute
from snapcore.store import SnapshotStore
from snapcore_jax.backend import JaxBackend
from snapcore_jax.models import Mlp

BACKEND = JaxBackend()
SNAPSHOT = program("snapshot", lr=0.1, steps=48, cycles=3)


def silent(step, loss):
    pass


def weights(state):
    return BACKEND.capture(state).resolve()


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def start(data, model="mlp", seed=0, **options):
    return BACKEND.init(model, data, SNAPSHOT, seed=seed, **options)


def run(method, data, directory, seed=0, model="mlp", **options):
    what = program(method, lr=0.1, steps=48, cycles=3)
    execute(what, BACKEND, model=model, data=data, directory=directory, seed=seed, **options)
    return what


def members(directory):
    store = SnapshotStore(directory)
    return [store.load(member.index) for member in store.members]


def probabilities(state, tensors, x):
    logits = BACKEND.logits(BACKEND.restore(state, tensors, optimizer="keep"), x).astype(np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


class Noisy(nnx.Module):
    """Batch statistics and dropout both."""

    def __init__(self, input_shape, n_classes, rngs):
        self.hidden = nnx.Linear(math.prod(input_shape), 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.output = nnx.Linear(16, n_classes, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x.reshape(len(x), -1))))))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_leaves_its_members_and_an_ensemble(method, digits, held_out, tmp_path):
    reports = []
    what = run(method, digits, tmp_path, report=lambda step, _: reports.append(step))
    store = SnapshotStore(tmp_path)
    assert [member.step for member in store.members] == list(what.schedule.snapshot_steps)
    assert [member.lr for member in store.members] == [what.schedule(member.step - 1) for member in store.members]
    assert {member.framework for member in store.members} == {"jax"}
    assert reports == list(range(1, what.updates + 1))
    assert store.stopped == "finished"

    x, labels = held_out
    each = [probabilities(start(digits), tensors, x) for tensors in members(tmp_path)]
    scores, together = [score(alone, labels) for alone in each], score(combine(np.stack(each)), labels)
    assert together["nll"] <= sum(alone["nll"] for alone in scores) / len(scores)
    assert together["error"] < 60  # 90 is chance; a member has 16 updates


def test_the_convolutional_network_learns_the_digits(digits, held_out, tmp_path):
    run("single", digits, tmp_path, model="cnn")
    (tensors,) = members(tmp_path)
    assert score(probabilities(start(digits, "cnn"), tensors, held_out[0]), held_out[1])["error"] < 15


def test_members_have_the_names_of_the_modules_own_paths(digits, tmp_path):
    run("single", digits, tmp_path, model=Noisy)
    (tensors,) = members(tmp_path)
    layers = {"hidden": ("bias", "kernel"), "norm": ("bias", "mean", "scale", "var"), "output": ("bias", "kernel")}
    assert set(tensors) == {f"{layer}/{name}" for layer, names in layers.items() for name in names}


@pytest.mark.parametrize(
    ("method", "at"), [("snapshot", 1), ("snapshot", 16), ("snapshot", 23), ("independent", 70), ("star", 33)]
)
def test_a_run_that_was_broken_off_resumes_to_the_members_of_one_that_was_not(method, at, digits, tmp_path):
    def breaking(step, loss):
        if step == at:
            raise KeyboardInterrupt

    run(method, digits, tmp_path / "whole", model=Noisy)
    with pytest.raises(KeyboardInterrupt):
        run(method, digits, tmp_path / "broken", model=Noisy, report=breaking, resume_every=5)
    run(method, digits, tmp_path / "broken", model=Noisy)
    for one, other in zip(members(tmp_path / "whole"), members(tmp_path / "broken"), strict=True):
        assert same(one, other)


def test_the_same_seed_gives_the_same_members_and_another_seed_others(digits, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("snapshot", digits, tmp_path / name, seed=seed)
    a, b, c = (members(tmp_path / name) for name in "abc")
    assert all(same(one, other) for one, other in zip(a, b, strict=True))
    assert not same(a[2], c[2])


@pytest.mark.parametrize("seed", [0, 2**31, 2**63])
def test_fresh_weights_come_from_the_seed_and_the_members_number_alone(digits, seed):
    first = weights(start(digits, seed=seed, member=3))
    assert same(weights(start(digits, seed=seed, member=3)), first)
    assert not same(weights(start(digits, seed=seed, member=2)), first)
    assert not same(weights(start(digits, seed=seed + 1, member=3)), first)


def test_independent_members_begin_with_the_fresh_weights_of_their_number(digits, tmp_path):
    """A member of `independent` is a run of its own: the same weights, batches and rates from its start on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CycleWarning)
        what = program("independent", lr=0.1, steps=5, cycles=3)
    execute(what, BACKEND, model="mlp", data=digits, directory=tmp_path, seed=4)
    for member, tensors in enumerate(members(tmp_path), 1):
        alone = BACKEND.init("mlp", digits, what, seed=4, member=member)
        alone = BACKEND.train(alone, 5 * (member - 1), 5 * member, report=silent)
        assert same(tensors, weights(alone))


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_restoring_brings_weights_and_statistics_back_and_leaves_the_old_state_alone(digits, moments):
    state = BACKEND.train(start(digits, Noisy), 0, 3, report=silent)
    tensors = weights(state)
    state = BACKEND.train(state, 3, 6, report=silent)
    later = weights(state)
    restored = BACKEND.restore(state, tensors, optimizer=moments)
    assert same(weights(restored), tensors)
    assert same(weights(state), later)
    largest = max(float(jnp.abs(array).max()) for array in jax.tree.leaves(restored.training.optimizer))
    assert (largest > 0) is (moments == "keep")


def test_what_was_restored_is_not_the_callers_arrays(digits):
    state, tensors = start(digits), weights(start(digits, seed=1))
    restored = BACKEND.restore(state, tensors, optimizer="reset")
    expected = {name: array.copy() for name, array in tensors.items()}
    for array in tensors.values():
        array.fill(7)
    assert same(weights(restored), expected)


def test_adam_is_reset_with_its_own_count_and_the_rate_continues(digits):
    def adam(rate):
        return optax.adam(rate)

    state = BACKEND.train(start(digits, optimizer=adam), 0, 20, report=silent)
    new = BACKEND.restore(start(digits, optimizer=adam), weights(state), optimizer="keep")
    reset = BACKEND.restore(state, None, optimizer="reset")
    new, reset = (BACKEND.train(each, 20, 25, report=silent) for each in (new, reset))
    assert same(weights(new), weights(reset))


def test_logits_are_those_of_evaluation(digits, held_out):
    state = BACKEND.train(start(digits, Noisy), 0, 3, report=silent)
    found = BACKEND.logits(state, held_out[0])
    assert (found.dtype, found.shape) == (np.float32, (797, 10))
    w = {name: array.astype(np.float64) for name, array in weights(state).items()}
    hidden = held_out[0].reshape(797, -1) @ w["hidden/kernel"] + w["hidden/bias"]
    hidden = (hidden - w["norm/mean"]) / np.sqrt(w["norm/var"] + 1e-5) * w["norm/scale"] + w["norm/bias"]
    np.testing.assert_allclose(found, np.maximum(hidden, 0) @ w["output/kernel"] + w["output/bias"], atol=1e-4)


def test_logits_of_many_examples_are_those_of_each(digits):
    state = start(digits)
    x = np.concatenate([digits.x] * 3)[:2500]
    x.flags.writeable = False
    found = BACKEND.logits(state, x)
    np.testing.assert_allclose(found[1000:2000], BACKEND.logits(state, digits.x), atol=1e-5)
    assert BACKEND.logits(state, x[:0]).shape == (0, 10)


def test_bfloat16_runs_and_its_members_are_float32(digits, tmp_path):
    run("snapshot", digits, tmp_path, model=Noisy, precision="bfloat16")
    assert {array.dtype for tensors in members(tmp_path) for array in tensors.values()} == {np.dtype(np.float32)}


class Exploding(nnx.Module):
    """Logits that leave the finite numbers at the given update."""

    at = 0

    def __init__(self, input_shape, n_classes, rngs):
        self.linear = nnx.Linear(64, n_classes, rngs=rngs)
        self.updates = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.updates[...] += 1
        return self.linear(x.reshape(len(x), -1)) * jnp.where(self.updates[...] == self.at, jnp.nan, 1)


@pytest.mark.parametrize(("at", "kept"), [(1, 0), (32, 1), (48, 2)])
def test_a_loss_that_is_not_finite_names_its_update_and_keeps_the_members_before(digits, tmp_path, at, kept):
    model = type("ExplodingThere", (Exploding,), {"at": at})
    with pytest.raises(DivergedError, match=rf"the loss of update {at} is nan"):
        execute(SNAPSHOT, BACKEND, model=model, data=digits, directory=tmp_path, seed=0)
    store = SnapshotStore(tmp_path)
    assert len(store.members) == kept
    assert store.stopped is None
    store.verify()


def test_metrics_are_asked_of_the_very_state_that_is_captured(digits, held_out, tmp_path):
    def metrics(snapshot, state):
        return {"first": float(BACKEND.logits(state, held_out[0])[0, 0])}

    run("snapshot", digits, tmp_path, metrics=metrics)
    for member, tensors in zip(SnapshotStore(tmp_path).members, members(tmp_path), strict=True):
        state = BACKEND.restore(start(digits), tensors, optimizer="keep")
        assert member.metrics["first"] == BACKEND.logits(state, held_out[0])[0, 0]


def test_a_model_may_be_a_function_of_the_input_shape_the_number_of_classes_and_random_keys(digits):
    asked = set()

    def model(shape, n_classes, rngs):
        asked.add((shape, n_classes, type(rngs)))
        return Mlp(shape, n_classes, rngs)

    start(digits, model)
    assert asked == {((1, 8, 8), 10, nnx.Rngs)}


def test_a_model_that_there_is_not_is_refused_with_those_there_are(digits):
    with pytest.raises(DataError, match=r"model must be one of \['cnn', 'fcn', 'mlp'\] or a function.*got 'resnet'"):
        start(digits, "resnet")


def test_a_module_of_another_library_is_refused(digits):
    with pytest.raises(DataError, match=r"must give a flax\.nnx\.Module, got Dense"):
        start(digits, lambda shape, n_classes, rngs: linen.Dense(n_classes))


def test_a_model_that_does_not_take_the_examples_is_refused_in_its_own_words():
    flat = TrainingData(np.zeros((8, 64), np.float32), np.zeros(8, int), 2, 4)
    with pytest.raises(DataError, match="cnn needs examples of"):
        start(flat, "cnn")


def test_a_precision_that_there_is_not_is_refused(digits):
    with pytest.raises(DataError, match=r"precision must be one of \['bfloat16', 'float32'\], got 'float16'"):
        start(digits, precision="float16")


def test_it_says_what_it_would_run_on():
    assert BACKEND.about() == f"jax {jax.__version__} on {jax.devices()[0].device_kind}"
