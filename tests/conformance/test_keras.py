"""The suite on Keras, on its default backend here and on the others in processes of their own."""

import keras
from keras import layers

from snapcore.testing import BackendConformance
from snapcore_keras.backend import KerasBackend


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


class TestKerasBackend(BackendConformance):
    model = "cnn"
    random_model = staticmethod(with_dropout)

    def backend(self):
        return KerasBackend()
