"""The managed loop in PyTorch beside the same loop written by hand: same weights, batches, rates and kernels."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cases import Setting, Suite
from compare import Contender
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch_common import DEVICE, GPU, about, resnet, synchronize

from snapcore import program
from snapcore.data import TrainingData
from snapcore_torch.backend import TorchBackend

suite = Suite(about())

LR, STEPS = 0.05, 10**6
Train = Callable[[int, int], None]
COMPILING: Any = {} if GPU else {"backend": "eager"}


def images(setting: Setting) -> TrainingData:
    """Return noise of CIFAR's shape."""
    examples, batch = setting.pick(full=(8192, 128), small=(512, 32), tiny=(32, 8))
    side = setting.pick(full=32, small=16, tiny=8)
    setting.found |= {"batch": batch, "side": side}
    random = np.random.default_rng(0)
    x = random.standard_normal((examples, 3, side, side), np.float32)
    return TrainingData(x, random.integers(0, 10, examples), n_classes=10, batch_size=batch)


def mlp(setting: Setting) -> nn.Module:
    side = setting.found["side"]
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 128), nn.ReLU(), nn.Linear(128, 10))


def convolutional(setting: Setting) -> nn.Module:
    width, blocks = setting.pick(full=(16, (3, 3, 3)), small=(8, (1, 1)), tiny=(4, (1,)))
    return resnet(width, blocks, 10)


def managed(begun: nn.Module, data: TrainingData, **options: Any) -> Train:
    backend, method = TorchBackend(), program("snapshot", lr=LR, steps=STEPS, cycles=2)
    state = backend.init(lambda *_: copy.deepcopy(begun), data, method, seed=0, **options)

    def train(start: int, stop: int) -> None:
        backend.train(state, start, stop, report=lambda *_: None)
        synchronize()

    return train


def by_hand(begun: nn.Module, data: TrainingData, *, compiled: bool) -> Train:
    model = copy.deepcopy(begun).to(DEVICE).train()
    call = torch.compile(model, **COMPILING) if compiled else model
    optimizer = SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    x, y = torch.from_numpy(data.x).to(DEVICE), torch.from_numpy(data.y).to(DEVICE)
    length = STEPS // 2

    def train(start: int, stop: int) -> None:
        losses = []
        rows = torch.from_numpy(data.indices(start, stop)).to(DEVICE)
        for step, batch in enumerate(rows, start):
            optimizer.param_groups[0]["lr"] = LR / 2 * (math.cos(math.pi * (step % length) / length) + 1)
            loss = functional.cross_entropy(call(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        torch.stack(losses).tolist()
        synchronize()

    return train


def continued(train: Train, updates: int) -> Contender:
    """Return a contender whose every sample does the next updates."""
    done = 0

    def run() -> None:
        nonlocal done
        train(done, done + updates)
        done += updates

    return Contender(run, units=updates)


def loops(setting: Setting, make: Callable[[Setting], nn.Module], updates: int, *, compiled: bool = False) -> None:
    data = images(setting)
    torch.manual_seed(0)
    begun = make(setting)
    setting.found |= {"updates in a sample": updates, "parameters": sum(each.numel() for each in begun.parameters())}
    options: Any = {"compile": COMPILING} if compiled else {}
    setting.compare(
        {"managed": continued(managed(begun, data, **options), updates)},
        {"by hand": continued(by_hand(begun, data, compiled=compiled), updates)},
    )


@suite.comparison("an MLP, eager, per update")
def small_and_eager(setting: Setting) -> None:
    loops(setting, mlp, setting.pick(full=500, small=200, tiny=8))


@suite.comparison("a residual network, eager, per update")
def eager(setting: Setting) -> None:
    loops(setting, convolutional, setting.pick(full=50, small=10, tiny=2))


@suite.comparison("a residual network, compiled, per update", share=3)
def compiled(setting: Setting) -> None:
    loops(setting, convolutional, setting.pick(full=50, small=10, tiny=2), compiled=True)
