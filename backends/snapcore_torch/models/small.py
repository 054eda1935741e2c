"""The built-in models: small, fast on a CPU, and of the same shape in every framework."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from snapcore import DataError

Factory = Callable[[tuple[int, ...], int], nn.Module]


def mlp(input_shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """Return a perceptron with two hidden layers of 128 units.

    Arguments:
        input_shape: of one example, such as (1, 28, 28).
        n_classes: width of the output, such as logits.
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
    """Return three convolutions with batch normalisation, each pooled, and a head with one hidden layer.

    Arguments:
        input_shape: of one example: (channels, height, width), each side 8 or more.
        n_classes: width of the output, which are logits.

    Raises:
        DataError: the examples are no images, or smaller than 8 × 8.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < 8:
        raise DataError(f"cnn needs examples of (channels, height, width), each side 8 or more; got {input_shape}")
    widths = (input_shape[0], 32, 64, 128)
    pooled = (input_shape[1] // 8) * (input_shape[2] // 8)
    return nn.Sequential(
        *itertools.starmap(_block, itertools.pairwise(widths)),
        nn.Flatten(),
        nn.Linear(widths[-1] * pooled, 128),
        nn.ReLU(),
        nn.Linear(128, n_classes),
    )


def fcn(input_shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """Return five 3 × 3 convolutions of 32 channels with batch normalisation, and a linear layer on each pixel.

    The outputs are [batch, height, width, n_classes]. A pixel's depend on the 11 × 11 around it.

    Arguments:
        input_shape: of one example: (channels, height, width).
        n_classes: numbers for each pixel, such as logits.

    Raises:
        DataError: the examples are no images.
    """
    if len(input_shape) != 3:
        raise DataError(f"fcn needs examples of (channels, height, width), got {input_shape}")
    widths = (input_shape[0], 32, 32, 32, 32, 32)
    blocks = itertools.starmap(_convolution, itertools.pairwise(widths))
    return nn.Sequential(*blocks, _ChannelsLast(), nn.Linear(widths[-1], n_classes))


class _ChannelsLast(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1)


def _convolution(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def _block(before: int, after: int) -> nn.Module:
    return nn.Sequential(*_convolution(before, after), nn.MaxPool2d(2))


MODELS: dict[str, Factory] = {"mlp": mlp, "cnn": cnn, "fcn": fcn}
