"""The suite on Keras, with batch statistics and with dropout: on its default backend, and on the others alone."""

import os
import subprocess
import sys

import keras
import pytest
from keras import layers

from snapcore.testing import BackendConformance
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


@pytest.mark.parametrize("name", sorted({"tensorflow", "jax", "torch"} - {keras.backend.backend()}))
def test_every_rule_holds_on_another_backend_of_keras(name):
    environment = {**os.environ, "KERAS_BACKEND": name, "PYTHONPATH": os.pathsep.join(sys.path), "SNAPCORE_REQUIRE": ""}
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "TestKerasBackend"]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 passed" in done.stdout
