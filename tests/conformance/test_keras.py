"""The suites on Keras, with batch statistics and with dropout: on its default backend, and on the others alone."""

import contextlib
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


class Watch(keras.callbacks.Callback):
    """Has the suite look at the model, once it is Keras' own again; two stand around the callback under test."""

    def __init__(self, *, before=None, after=None):
        super().__init__()
        self.before, self.after = before, after

    def on_train_batch_begin(self, batch, logs=None):
        if self.before:
            self.model.count_params()
            self.before()

    def on_train_batch_end(self, batch, logs=None):
        if self.after and self.model and self.after():
            self.model.stop_training = True


class TestKerasCallback(RunConformance):
    framework = "keras"

    def new(self, seed, schedule):
        keras.utils.set_random_seed(seed)
        middle = [layers.Dense(4, name="hidden"), layers.BatchNormalization(name="norm"), layers.Dropout(0.3)]
        model = keras.Sequential([keras.Input((3,)), *middle, layers.Dense(2, name="output")])
        model.compile(keras.optimizers.SGD(SnapshotSchedule(schedule), momentum=0.9), "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    def init(self, seed, schedule):
        return self.new(seed, schedule)

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
                callbacks=[Watch(after=after), callback, Watch(before=before)],
            )

    def weights(self, subject):
        paths = [weight.path.partition("/")[2] for weight in subject.weights]
        return {
            f"{place:03d}/{path}": each
            for place, (path, each) in enumerate(zip(paths, subject.get_weights(), strict=True))
        }

    def moments(self, subject):
        return [keras.ops.convert_to_numpy(each) for each in subject.optimizer.variables if "momentum" in each.path]

    def rate(self, subject):
        return float(subject.optimizer.learning_rate)

    def spoil(self, subject):
        subject.layers[0].bias.assign(np.full(4, np.nan))

    def ensemble(self, directory, x):
        ensemble = SnapshotEnsemble.load(directory, self.new(0, self.cycles), activation="softmax")
        return [keras.ops.convert_to_numpy(each) for each in (ensemble(x), ensemble.members(x))]


@pytest.mark.parametrize("name", sorted({"tensorflow", "jax", "torch"} - {keras.backend.backend()}))
def test_every_rule_holds_on_another_backend_of_keras(name):
    environment = {**os.environ, "KERAS_BACKEND": name, "PYTHONPATH": os.pathsep.join(sys.path), "SNAPCORE_REQUIRE": ""}
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "TestKerasBackend"]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 passed" in done.stdout
