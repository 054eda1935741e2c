"""The suite on TensorFlow with data in parallel; run by `test_tensorflow.py` in a process that has two devices."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from snapcore import DataError
from snapcore.testing import BackendConformance
from snapcore_tensorflow.backend import TensorFlowBackend

DEVICES = ["CPU:0", "CPU:1"]

(CPU,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(CPU, [tf.config.LogicalDeviceConfiguration()] * len(DEVICES))
STRATEGY = tf.distribute.MirroredStrategy(DEVICES)


def with_statistics(input_shape, n_classes, *, synchronized=False, rate=0.0):
    middle = [layers.Dense(16), layers.BatchNormalization(momentum=0.9, synchronized=synchronized)]
    last = [layers.Dropout(rate), layers.ReLU(), layers.Dense(n_classes)]
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), *middle, *last])


def with_dropout(input_shape, n_classes):
    return with_statistics(input_shape, n_classes, rate=0.2)


def with_statistics_of_all(input_shape, n_classes):
    return with_statistics(input_shape, n_classes, synchronized=True)


class TestTensorFlowBackendMirrored(BackendConformance):
    model = staticmethod(with_statistics)
    random_model = staticmethod(with_dropout)
    options = {"strategy": STRATEGY}  # noqa: RUF012

    def backend(self):
        return TensorFlowBackend()


def shared_and_alone(model, steps=6, **options):
    suite = TestTensorFlowBackendMirrored()
    suite.model = model
    suite.options = {**options, "strategy": STRATEGY}
    shared = suite._weights(suite._trained(steps))
    suite.options = options
    return shared, suite._weights(suite._trained(steps))


@pytest.mark.parametrize("velocity", ["gradients", "updates"])
def test_two_devices_share_a_batch_and_train_as_one_does(velocity):
    shared, alone = shared_and_alone("mlp", velocity=velocity)
    for name, array in alone.items():
        np.testing.assert_allclose(shared[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_statistics_that_a_layer_synchronizes_are_those_of_the_whole_batch():
    shared, alone = shared_and_alone(with_statistics_of_all)
    for name, array in alone.items():
        np.testing.assert_allclose(shared[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_the_loss_reported_is_that_of_the_whole_batch():
    suite, reports = TestTensorFlowBackendMirrored(), []
    for strategy in (STRATEGY, None):
        suite.model, suite.options = "mlp", {"strategy": strategy}
        losses = []
        suite.backend().train(suite._init(), 0, 6, report=lambda step, loss, losses=losses: losses.append(loss))
        reports.append(losses)
    np.testing.assert_allclose(*reports, rtol=1e-5)


def test_a_device_in_whose_part_less_counts_weighs_less():
    """Labels that are ignored lie first in every batch: in the first device's part."""
    suite, given = TestTensorFlowBackendMirrored(), TestTensorFlowBackendMirrored().data()
    y = given.y.copy()
    y[given.indices(0, 6)[:, :7]] = -1
    data, found = dataclasses.replace(given, y=y, ignore=-1), []
    for strategy in (STRATEGY, None):
        suite.options, losses = {"strategy": strategy}, []
        state = suite._init(model="mlp", data=data)
        state = suite.backend().train(state, 0, 6, report=lambda step, loss, losses=losses: losses.append(loss))
        found.append((losses, suite._weights(state)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    for name, array in found[1][1].items():
        np.testing.assert_allclose(found[0][1][name], array, rtol=0, atol=1e-5, err_msg=name)


def test_a_batch_that_two_devices_cannot_share_is_refused():
    suite = TestTensorFlowBackendMirrored()
    suite.data = lambda: dataclasses.replace(TestTensorFlowBackendMirrored().data(), batch_size=13)
    with pytest.raises(DataError, match=r"a batch of 13 cannot be split over 2 devices: .* such as 14"):
        suite._init()
