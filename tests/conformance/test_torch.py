"""The suite on PyTorch: the CNN for its batch statistics, and a network with dropout for its random states."""

from torch import nn

from snapcore.testing import BackendConformance
from snapcore_torch.backend import TorchBackend


def with_dropout(input_shape, n_classes):
    pixels = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, n_classes))


class TestTorchBackend(BackendConformance):
    model = "cnn"
    random_model = staticmethod(with_dropout)

    def backend(self):
        return TorchBackend()
