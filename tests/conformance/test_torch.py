"""The suite on PyTorch: the CNN for its batch statistics, a network with dropout for its random states; all options."""

from typing import Any, ClassVar

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


class TestNarrow(TestTorchBackend):
    options: ClassVar[dict[str, Any]] = {"precision": "bfloat16"}


class TestScaled(TestTorchBackend):
    options: ClassVar[dict[str, Any]] = {"precision": "float16", "clip_norm": 100.0}


class TestAccumulated(TestTorchBackend):
    options: ClassVar[dict[str, Any]] = {"accumulate": 4, "channels_last": True}


class TestCompiled(TestTorchBackend):
    options: ClassVar[dict[str, Any]] = {"compile": {"backend": "eager"}}


class TestAveraged(TestTorchBackend):
    """With a decay of 0 the averages are the weights, so that rules about going on from a member hold for them too."""

    options: ClassVar[dict[str, Any]] = {"ema": 0.0}
