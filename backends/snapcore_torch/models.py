"""The built-in models: small, fast on a CPU, and of the same shape in every framework."""

import itertools
from collections.abc import Callable

import torch
from torch import nn

Factory = Callable[[tuple[int, ...], int], nn.Module]


def mlp(input_shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """Return a perceptron with two hidden layers of 128 units.

    Arguments:
        input_shape: of one example, such as (1, 28, 28).
        n_classes: width of the output, which are logits.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(int(torch.Size(input_shape).numel()), 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, n_classes),
    )


def cnn(input_shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """Return three convolutions with batch normalisation, pooled between, and a linear head.

    Arguments:
        input_shape: of one example: (channels, height, width), each side 4 or more.
        n_classes: width of the output, which are logits.
    """
    widths = (input_shape[0], 16, 32, 64)
    blocks = [_block(before, after) for before, after in itertools.pairwise(widths)]
    pool = nn.MaxPool2d(2)
    return nn.Sequential(
        blocks[0], pool, blocks[1], pool, blocks[2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, n_classes)
    )


def _block(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


MODELS: dict[str, Factory] = {"mlp": mlp, "cnn": cnn}
