"""The suite on TensorFlow, with batch statistics, and with dropout for its random states."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
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


@pytest.mark.parametrize("options", [{"xla": True}, {"velocity": "updates"}], ids=str)
def test_the_rules_of_exactness_hold_however_updates_are_compiled_and_velocities_kept(options):
    suite = TestTensorFlowBackend()
    suite.options = options
    suite.test_rule_07_training_in_two_parts_is_training_at_once()
    suite.test_rule_09_reset_clears_the_moments_and_not_the_count()
    suite.test_rule_12_a_dump_loaded_into_another_state_goes_on_exactly()


def test_every_rule_holds_on_two_mirrored_devices():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SNAPCORE_REQUIRE": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(MIRRORED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 passed" in done.stdout
