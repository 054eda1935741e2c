"""The suites on PyTorch. For the backend: the CNN for its batch statistics, one with dropout, and all options."""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from snapcore.testing import BackendConformance, LoopConformance
from snapcore_torch import SnapshotEnsemble, SnapshotRun
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
    tolerance = 0.03


class TestScaled(TestTorchBackend):
    options: ClassVar[dict[str, Any]] = {"precision": "float16", "clip_norm": 100.0}
    tolerance = 0.003


class TestAccumulated(TestTorchBackend):
    options: ClassVar[dict[str, Any]] = {"accumulate": 4, "channels_last": True}


class TestCompiled(TestTorchBackend):
    options: ClassVar[dict[str, Any]] = {"compile": {"backend": "eager"}}


class TestAveraged(TestTorchBackend):
    """With a decay of 0 the averages are the weights, so rules about continuing from a member hold for them too."""

    options: ClassVar[dict[str, Any]] = {"ema": 0.0}


class TestTorchRun(LoopConformance):
    framework = "torch"

    def new(self, seed, schedule):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
        return SimpleNamespace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    def init(self, seed, schedule):
        return self.new(seed, schedule).model

    def open(self, directory, cycles, subject, **options):
        return SnapshotRun(directory, cycles, subject.model, subject.optimizer, **options)

    def update(self, subject, x):
        subject.optimizer.zero_grad()
        (subject.model(torch.from_numpy(x)) - 1).square().mean().backward()
        subject.optimizer.step()

    def weights(self, subject):
        return {name: tensor.numpy() for name, tensor in subject.model.state_dict().items()}

    def moments(self, subject):
        return [state["momentum_buffer"].numpy() for state in subject.optimizer.state.values()]

    def rate(self, subject):
        return subject.optimizer.param_groups[0]["lr"]

    def spoil(self, subject):
        nn.init.constant_(subject.model[0].weight, torch.nan)

    def ensemble(self, directory, x):
        ensemble = SnapshotEnsemble.load(directory, self.new(0, self.cycles).model)
        return ensemble(torch.from_numpy(x)).numpy(), ensemble.members(torch.from_numpy(x)).numpy()
