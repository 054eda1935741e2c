"""The suite on TensorFlow: the CNN for its batch statistics, and a network with dropout for its random states."""

import keras
from keras import layers

from snapcore.testing import BackendConformance
from snapcore_tensorflow.backend import TensorFlowBackend


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


class TestTensorFlowBackend(BackendConformance):
    model = "cnn"
    random_model = staticmethod(with_dropout)

    def backend(self):
        return TensorFlowBackend()


class TestTensorFlowBackendWithXla(BackendConformance):
    random_model = staticmethod(with_dropout)
    options = {"xla": True}  # noqa: RUF012

    def backend(self):
        return TensorFlowBackend()


class TestTensorFlowBackendWithVelocityOfUpdates(BackendConformance):
    random_model = staticmethod(with_dropout)
    options = {"velocity": "updates"}  # noqa: RUF012

    def backend(self):
        return TensorFlowBackend()
