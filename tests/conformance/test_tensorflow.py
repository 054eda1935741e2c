"""The suite on TensorFlow, with batch statistics, and with dropout for its random states."""

from pathlib import Path

import keras
import pytest
import pytest.__main__
from keras import layers

from snapcore.testing import BackendConformance
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


@pytest.mark.parametrize("options", [{"xla": True}, {"velocity": "updates"}], ids=str)
def test_the_rules_of_exactness_hold_however_updates_are_compiled_and_velocities_kept(options):
    suite = TestTensorFlowBackend()
    suite.options = options
    suite.test_rule_07_training_in_two_parts_is_training_at_once()
    suite.test_rule_09_reset_clears_the_moments_and_not_the_count()
    suite.test_rule_12_a_dump_loaded_into_another_state_goes_on_exactly()


def test_every_rule_holds_on_two_mirrored_devices(tmp_path):
    process = Forked(
        pytest.__main__.__file__, "-q", "-p", "no:cacheprovider", MIRRORED, log=tmp_path / "log", SNAPCORE_REQUIRE=""
    )
    assert process.wait() == 0, process.output + process.errors
    assert "20 passed" in process.output
