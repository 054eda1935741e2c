"""The verbs of the TensorFlow backend, and every method run through them on digits."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from snapcore import METHODS, DataError, DivergedError, program
from snapcore.backend import load_backend
from snapcore.data import TrainingData
from snapcore.ensemble import combine
from snapcore.metrics import score
from snapcore.run import execute
from snapcore.store import SnapshotStore
from snapcore_tensorflow import backend as module
from snapcore_tensorflow.backend import TensorFlowBackend

BACKEND = TensorFlowBackend()
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


def noisy(input_shape, n_classes):
    """Batch statistics and dropout both."""
    middle = [layers.Dense(16), layers.BatchNormalization(), layers.Dropout(0.2), layers.ReLU()]
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), *middle, layers.Dense(n_classes)])


@pytest.mark.exhaustive(keep=3)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_leaves_its_members_and_an_ensemble(method, digits, held_out, tmp_path):
    reports = []
    what = run(method, digits, tmp_path, report=lambda step, _: reports.append(step))
    store = SnapshotStore(tmp_path)
    assert [member.step for member in store.members] == list(what.schedule.snapshot_steps)
    assert [member.lr for member in store.members] == [what.schedule(member.step - 1) for member in store.members]
    assert {member.framework for member in store.members} == {"tensorflow"}
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


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize(
    ("method", "at"), [("snapshot", 1), ("snapshot", 16), ("snapshot", 23), ("independent", 70), ("star", 33)]
)
def test_a_run_that_was_broken_off_resumes_to_the_members_of_one_that_was_not(method, at, digits, tmp_path):
    def breaking(step, loss):
        if step == at:
            raise KeyboardInterrupt

    run(method, digits, tmp_path / "whole", model=noisy)
    with pytest.raises(KeyboardInterrupt):
        run(method, digits, tmp_path / "broken", model=noisy, report=breaking, resume_every=5)
    run(method, digits, tmp_path / "broken", model=noisy)
    for one, other in zip(members(tmp_path / "whole"), members(tmp_path / "broken"), strict=True):
        assert same(one, other)


@pytest.mark.parametrize("seed", [0, 2**31, 2**63])
def test_fresh_weights_come_from_the_seed_and_the_members_number_alone(digits, seed):
    first = weights(start(digits, seed=seed, member=3))
    assert same(weights(start(digits, seed=seed, member=3)), first)
    assert not same(weights(start(digits, seed=seed, member=2)), first)
    assert not same(weights(start(digits, seed=seed + 1, member=3)), first)


def test_independent_members_begin_with_the_fresh_weights_of_their_number(digits, tmp_path):
    """A member of `independent` is a run of its own: the same weights, batches and rates from its start on."""
    what = run("independent", digits, tmp_path, seed=4)
    for member, tensors in enumerate(members(tmp_path), 1):
        alone = BACKEND.init("mlp", digits, what, seed=4, member=member)
        BACKEND.train(alone, what.updates // 3 * (member - 1), what.updates // 3 * member, report=silent)
        assert same(tensors, weights(alone))


def test_logits_are_those_of_evaluation(digits, held_out):
    state = BACKEND.train(start(digits, noisy), 0, 3, report=silent)
    found = BACKEND.logits(state, held_out[0])
    assert (found.dtype, found.shape) == (np.float32, (797, 10))
    kernel, bias, gamma, beta, mean, variance, last, off = (each.astype(float) for each in weights(state).values())
    hidden = held_out[0].reshape(797, -1) @ kernel + bias
    hidden = (hidden - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    np.testing.assert_allclose(found, np.maximum(hidden, 0) @ last + off, atol=1e-4)


def test_a_loss_that_is_not_finite_names_its_update_and_keeps_the_members_before(digits, tmp_path):
    class Exploding(layers.Layer):
        """Not a number from the 33rd update on."""

        def build(self, shape):
            self.updates = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

        def call(self, x, training=False):
            if training:
                self.updates.assign_add(1)
            return x * tf.where(self.updates.value > 32, np.nan, 1.0)

    def model(input_shape, n_classes):
        return keras.Sequential([keras.Input(input_shape), layers.Flatten(), layers.Dense(n_classes), Exploding()])

    with pytest.raises(DivergedError, match=r"the loss of update 33 is nan"):
        execute(SNAPSHOT, BACKEND, model=model, data=digits, directory=tmp_path, seed=0)
    store = SnapshotStore(tmp_path)
    assert len(store.members) == 2
    store.verify()


def test_a_model_that_there_is_not_is_refused_with_those_there_are(digits):
    with pytest.raises(DataError, match=r"model must be one of \['cnn', 'fcn', 'mlp'\] or a function.*got 'resnet'"):
        start(digits, "resnet")


def test_a_precision_that_there_is_not_is_refused(digits):
    with pytest.raises(DataError, match=r"precision must be one of \['bfloat16', 'float32'\], got 'float16'"):
        start(digits, precision="float16")


def test_an_optimizer_with_a_schedule_of_its_own_is_refused(digits):
    def stubborn(rate):
        return keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(rate, 10))

    with pytest.raises(DataError, match="made with the rate it is given, a number"):
        start(digits, optimizer=stubborn)


def test_an_optimizer_that_accumulates_gradients_is_refused(digits):
    def slow(rate):
        return keras.optimizers.SGD(rate, gradient_accumulation_steps=2)

    with pytest.raises(DataError, match="without gradient_accumulation_steps"):
        start(digits, optimizer=slow)


class Three:
    """A strategy of three devices, as far as a batch is concerned."""

    num_replicas_in_sync = 3


def test_a_batch_that_several_devices_cannot_share_is_refused(digits):
    with pytest.raises(DataError, match=r"a batch of 50 cannot be split over 3 devices: .* such as 51"):
        start(digits, strategy=Three())


def test_xla_and_several_devices_are_refused_together(digits):
    data = TrainingData(digits.x, digits.y, 10, batch_size=51)
    with pytest.raises(DataError, match="pass xla=True or strategy=, not both"):
        start(data, strategy=Three(), xla=True)


def test_it_says_what_it_would_run_on():
    device = "cpu" if not tf.config.list_physical_devices("GPU") else ""
    assert BACKEND.about().startswith(f"tensorflow {tf.__version__} on {device}")


class Machine:
    """What TensorFlow says of a machine with two GPUs, and what it is asked to do with their memory."""

    def __init__(self, monkeypatch, *, limited=(), in_use=False):
        self.grows, self._limited, self._in_use = [], limited, in_use
        gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{number}", "GPU") for number in range(2)]
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
        monkeypatch.setattr(tf.config, "get_logical_device_configuration", self._configuration)
        monkeypatch.setattr(tf.config.experimental, "set_memory_growth", self._grow)
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: {"device_name": "Fast One"})

    def _configuration(self, gpu):
        return [tf.config.LogicalDeviceConfiguration(1024)] if gpu.name[-1] in self._limited else None

    def _grow(self, gpu, enable):
        if self._in_use:
            raise RuntimeError("Physical devices cannot be modified after being initialized")
        self.grows.append((gpu.name[-1], enable))


def test_tensorflow_is_asked_to_take_no_more_of_a_gpus_memory_than_it_needs(monkeypatch):
    """Beside another framework, a process that takes all of the memory leaves none."""
    machine = Machine(monkeypatch)
    assert TensorFlowBackend().about().endswith("on Fast One")
    assert machine.grows == [("0", True), ("1", True)]


def test_a_gpu_whose_memory_is_limited_already_is_left_alone(monkeypatch):
    machine = Machine(monkeypatch, limited=("0",))
    TensorFlowBackend()
    assert machine.grows == [("1", True)]


def test_memory_stays_as_it_is_where_tensorflow_was_in_use_before_and_that_is_said(monkeypatch, caplog):
    machine = Machine(monkeypatch, in_use=True)
    TensorFlowBackend()
    assert machine.grows == []
    assert [record.name for record in caplog.records] == [module.__name__] * 2
    assert "unless tf.config.experimental.set_memory_growth was called" in caplog.text


REFUSED = """
import sys

class Without:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
from snapcore import BackendNotFoundError
from snapcore.backend import load_backend
try:
    load_backend("tensorflow")
except BackendNotFoundError as error:
    print("refused:", error)
"""


def refusal(configured, missing=""):
    """Return what is said when Keras is configured for a backend, and a package is not installed."""
    full = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "KERAS_BACKEND": configured}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, missing], env=full, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.exhaustive
def test_keras_on_another_backend_is_refused_with_what_to_do():
    cure = "it runs on jax: set the environment variable KERAS_BACKEND=tensorflow before Keras is imported"
    assert cure in refusal("jax")


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("configured", ["tensorflow", "jax"])
def test_tensorflow_that_is_not_installed_is_named_with_what_to_install(configured):
    assert "needs TensorFlow: pip install 'snapcore[tensorflow]'" in refusal(configured, missing="tensorflow")


def test_a_backend_of_keras_that_is_not_installed_is_named_with_what_to_do():
    assert "it is to run on torch: set the environment variable KERAS_BACKEND" in refusal("torch", missing="torch")


def test_it_is_found_by_its_name():
    assert load_backend("tensorflow").name == "tensorflow"
