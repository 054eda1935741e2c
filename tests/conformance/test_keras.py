"""The suites on Keras, with batch statistics and with dropout: on its default backend, and on the others alone."""

import contextlib
import functools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from snapcore.testing import BackendConformance, RunConformance
from snapcore_keras import SnapshotCallback, SnapshotEnsemble, SnapshotSchedule
from snapcore_keras.backend import KerasBackend


def with_statistics(input_shape, n_classes):
    norm = layers.BatchNormalization(momentum=0.9)
    return keras.Sequential(
        [keras.Input(input_shape), layers.Flatten(), layers.Dense(16), norm, layers.ReLU(), layers.Dense(n_classes)]
    )


def with_dropout(input_shape, n_classes):
    dropout = layers.Dropout(0.2)
    return keras.Sequential(
        [keras.Input(input_shape), layers.Flatten(), layers.Dense(16), dropout, layers.ReLU(), layers.Dense(n_classes)]
    )


class TestKerasBackend(BackendConformance):
    model = staticmethod(with_statistics)
    random_model = staticmethod(with_dropout)

    def backend(self):
        return KerasBackend()


class Before(keras.callbacks.Callback):
    """Comes after the callback under test, whose work is done when a batch begins."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def on_train_batch_begin(self, batch, logs=None):
        assert self.model  # asked for it, Keras on JAX gives the variables their values
        self.look()


class After(Before):
    """Comes before it."""

    def on_train_batch_begin(self, batch, logs=None):
        pass

    def on_train_batch_end(self, batch, logs=None):
        if self.model and self.look():
            self.model.stop_training = True


def network(seed):
    keras.utils.set_random_seed(seed)
    middle = [layers.Dense(4, name="hidden"), layers.BatchNormalization(name="norm"), layers.Dropout(0.3, seed=seed)]
    return keras.Sequential([keras.Input((3,)), *middle, layers.Dense(2, name="output")])


@functools.cache
def compiled(schedule):
    """What takes most of the time, done once: `new` gives it the values that a new process has."""
    model = network(0)
    model.compile(keras.optimizers.SGD(SnapshotSchedule(schedule), momentum=0.9), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


class TestKerasCallback(RunConformance):
    framework = "keras"

    def new(self, seed, schedule):
        model = compiled(schedule)
        for own, new in zip(model.variables, network(seed).variables, strict=True):
            own.assign(new)
        for own in model.optimizer.variables:
            own.assign(np.zeros(own.shape))
        return model

    def init(self, seed, schedule):
        return network(seed)

    def train(self, directory, cycles, subject, *, before, after, **options):
        callback = SnapshotCallback(directory, cycles, **options)
        x = np.tile(self.x, (20, 1))
        with contextlib.closing(callback):
            subject.fit(
                x,
                np.ones((len(x), 2)),
                batch_size=len(self.x),
                shuffle=False,
                epochs=9,
                verbose=0,
                callbacks=[After(after), callback, Before(before)],
            )

    def weights(self, subject):
        paths = [weight.path.partition("/")[2] for weight in subject.weights]
        return {
            f"{position:03d}/{path}": each
            for position, (path, each) in enumerate(zip(paths, subject.get_weights(), strict=True))
        }

    def moments(self, subject):
        return [keras.ops.convert_to_numpy(each) for each in subject.optimizer.variables if "momentum" in each.path]

    def rate(self, subject):
        return float(subject.optimizer.learning_rate)

    def spoil(self, subject):
        subject.layers[0].bias.assign(np.full(4, np.nan))

    def ensemble(self, directory, x):
        ensemble = SnapshotEnsemble.load(directory, network(0), activation="softmax")
        return [keras.ops.convert_to_numpy(each) for each in (ensemble(x), ensemble.members(x))]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted({"tensorflow", "jax", "torch"} - {keras.backend.backend()}))
def test_every_rule_holds_on_another_backend_of_keras(name):
    environment = {**os.environ, "KERAS_BACKEND": name, "PYTHONPATH": os.pathsep.join(sys.path), "SNAPCORE_REQUIRE": ""}
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "TestKeras"]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "41 passed" in done.stdout
