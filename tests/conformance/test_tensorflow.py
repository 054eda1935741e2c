"""The suite on TensorFlow: the CNN for its batch statistics, and a network with dropout for its random states."""

import os
import subprocess
import sys
from pathlib import Path

import keras
from keras import layers

from snapcore.testing import BackendConformance
from snapcore_tensorflow.backend import TensorFlowBackend

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


def linear(input_shape, n_classes):
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), layers.Dense(n_classes)])


class TestTensorFlowBackend(BackendConformance):
    model = "cnn"
    random_model = staticmethod(with_dropout)

    def backend(self):
        return TensorFlowBackend()


class TestTensorFlowBackendWithXla(BackendConformance):
    model = staticmethod(linear)
    random_model = staticmethod(with_dropout)
    options = {"xla": True}  # noqa: RUF012

    def backend(self):
        return TensorFlowBackend()


class TestTensorFlowBackendWithVelocityOfUpdates(BackendConformance):
    random_model = staticmethod(with_dropout)
    options = {"velocity": "updates"}  # noqa: RUF012

    def backend(self):
        return TensorFlowBackend()


def test_every_rule_holds_on_two_mirrored_devices():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(MIRRORED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 passed" in done.stdout
