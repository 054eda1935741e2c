"""What is trained in the benchmarks: the built-in CNN on images, and a state of 100 MB."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from snapcore.data import TrainingData
from snapcore_torch.models import cnn

LR = 0.05
BATCH = 64
NAMES = {"mlp": "MLPs", "cnn": "CNNs", "residual": "residual nets"}
WIDTH, STAGES = 16, 3
Update = Callable[[Tensor, Tensor], None]


def digits() -> TrainingData:
    """Return the 1797 images of 8×8 that scikit-learn brings: small images show what a loop costs."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = ((images - images.mean()) / images.std()).astype(np.float32).reshape(-1, 1, 8, 8)
    return TrainingData(x, labels, n_classes=10, batch_size=BATCH)


def noise(side: int, examples: int = 1024) -> TrainingData:
    """Return images of noise, `side` × `side`."""
    random = np.random.default_rng(0)
    x = random.standard_normal((examples, 1, side, side), dtype=np.float32)
    return TrainingData(x, random.integers(0, 10, examples), n_classes=10, batch_size=BATCH)


def cnn_and_sgd(data: TrainingData) -> tuple[nn.Module, Optimizer]:
    """Return the built-in CNN, always with the same weights, and what the managed loop would train it with."""
    torch.manual_seed(0)
    model = cnn(data.x.shape[1:], data.n_classes)
    return model, SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)


def updates_of(model: nn.Module, optimizer: Optimizer) -> Update:
    """Return the update that a tutorial would write."""
    loss_fn = nn.CrossEntropyLoss()
    model.train()

    def update(x: Tensor, y: Tensor) -> None:
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def indexed(data: TrainingData) -> Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]:
    """Return a function of (start, stop) that indexes batches out of two tensors, in the data's order."""
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)

    def batches(start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.from_numpy(data.indices(start, stop)):
            yield x[rows], y[rows]

    return batches


class Residual(nn.Module):
    """A small residual network: a stem, and one block of two convolutions for each of three widths."""

    def __init__(self, input_shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        width = WIDTH
        self.stem = nn.Sequential(*normalised(input_shape[0], width))
        self.blocks, self.shortcuts = nn.ModuleList(), nn.ModuleList()
        for stage in range(STAGES):
            after, stride = WIDTH << stage, 2 if stage else 1
            parts = (*normalised(width, after, stride), nn.ReLU(), *normalised(after, after))
            self.blocks.append(nn.Sequential(*parts))
            self.shortcuts.append(nn.Conv2d(width, after, 1, stride, bias=False))
            width = after
        self.output = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = (block(x) + shortcut(x)).relu()
        return self.output(x.mean((2, 3)))


def normalised(before: int, after: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after)


def hundred_megabytes() -> nn.Module:
    """Return 25 layers of 1000×1000 float32 weights: 100 MB."""
    return nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(25)])
