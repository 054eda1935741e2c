"""The suites on TensorFlow, with batch statistics, and with dropout for its random states."""

import functools
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import pytest.__main__
import tensorflow as tf
from keras import layers

from snapcore import ProtocolError
from snapcore.store import SnapshotStore
from snapcore.testing import BackendConformance, LoopConformance
from snapcore_tensorflow import SnapshotEnsemble, SnapshotRun, SnapshotSchedule
from snapcore_tensorflow.backend import TensorFlowBackend

from ..forked import Forked

MIRRORED = Path(__file__).with_name("tensorflow_mirrored.py")


def with_dropout(input_shape, n_classes):
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Flatten(),
            layers.Dense(16),
            layers.Dropout(0.2),
            layers.ReLU(),
            layers.Dense(n_classes),
        ]
    )


def with_statistics(input_shape, n_classes):
    norm = layers.BatchNormalization(momentum=0.9)
    return keras.Sequential(
        [keras.Input(input_shape), layers.Flatten(), layers.Dense(16), norm, layers.ReLU(), layers.Dense(n_classes)]
    )


class TestTensorFlowBackend(BackendConformance):
    model = staticmethod(with_statistics)
    random_model = staticmethod(with_dropout)

    def backend(self):
        return TensorFlowBackend()


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{"xla": True}, {"velocity": "updates"}], ids=str)
def test_the_rules_of_exactness_hold_however_updates_are_compiled_and_velocities_kept(options):
    suite = TestTensorFlowBackend()
    suite.options = options
    suite.test_rule_07_training_in_two_parts_is_training_at_once()
    suite.test_rule_09_reset_clears_the_moments_and_not_the_count()
    suite.test_rule_12_a_dump_loaded_into_another_state_resumes_exactly()


@pytest.mark.exhaustive
def test_every_rule_holds_on_two_mirrored_devices(tmp_path):
    process = Forked(
        pytest.__main__.__file__, "-q", "-p", "no:cacheprovider", MIRRORED, log=tmp_path / "log", SNAPCORE_REQUIRE=""
    )
    assert process.wait() == 0, process.output + process.errors
    assert "23 passed" in process.output


def network(seed):
    keras.utils.set_random_seed(seed)
    middle = [layers.Dense(4, name="hidden"), layers.BatchNormalization(name="norm"), layers.Dropout(0.3)]
    return keras.Sequential([keras.Input((3,)), *middle, layers.Dense(2, name="output")])


@functools.cache
def traced(rate):
    """What takes most of the time, done once: `new` gives it the values that a new process has."""
    model, optimizer = network(0), keras.optimizers.SGD(rate, momentum=0.9)
    optimizer.build(model.trainable_variables)

    @tf.function
    def update(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - 1))
        optimizer.apply(tape.gradient(loss, model.trainable_variables))

    return SimpleNamespace(model=model, optimizer=optimizer, update=update)


class TestTensorFlowRun(LoopConformance):
    framework = "tensorflow"
    rate_given = staticmethod(functools.cache(SnapshotSchedule))

    def new(self, seed, schedule):
        subject = traced(self.rate_given(schedule))
        for own, new in zip(subject.model.variables, network(seed).variables, strict=True):
            own.assign(new)
        for own in subject.optimizer.variables:
            own.assign(tf.zeros_like(own))
        return subject

    def init(self, seed, schedule):
        return network(seed)

    def open(self, directory, cycles, subject, **options):
        return SnapshotRun(directory, cycles, subject.model, subject.optimizer, **options)

    def update(self, subject, x):
        subject.update(tf.constant(x))

    def weights(self, subject):
        paths = [weight.path.partition("/")[2] for weight in subject.model.weights]
        return {
            f"{position:03d}/{path}": subject.model.weights[position].numpy() for position, path in enumerate(paths)
        }

    def moments(self, subject):
        return [each.numpy() for each in subject.optimizer.variables if "momentum" in each.path]

    def rate(self, subject):
        return float(subject.optimizer.learning_rate)

    def spoil(self, subject):
        subject.model.layers[0].bias.assign(np.full(4, np.nan))

    def ensemble(self, directory, x):
        ensemble = SnapshotEnsemble.load(directory, network(0), activation="softmax")
        return ensemble(x).numpy(), ensemble.members(x).numpy()


class TestTensorFlowRunAtAPlainRate(TestTensorFlowRun):
    @staticmethod
    def rate_given(schedule):
        return 0.7

    def test_rule_30_a_late_member_is_warned_of_and_recorded_with_the_true_step(self, tmp_path):
        """Several updates between two calls would all be done at the rate before them."""

        def call_once():
            subject = self.new(0, self.cycles)
            with self.open(tmp_path / "run", self.cycles, subject) as run:
                for _ in range(8):
                    self.update(subject, self.x)
                self.step(run, subject)

        with pytest.raises(ProtocolError, match="8 updates were done in 1 calls"):
            call_once()
        assert not SnapshotStore(tmp_path / "run").members
