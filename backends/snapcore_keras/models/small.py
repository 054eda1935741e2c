"""The built-in models in Keras: small, fast on a CPU, and of the same shape in every framework.

Weights begin as PyTorch's layers do, uniform within ±1/√fan-in, biases at 0: from Keras' own initial weights the first
cycles are much slower.
"""

from collections.abc import Callable

import keras
from keras import layers

from snapcore import DataError

Factory = Callable[[tuple[int, ...], int], keras.Model]
"""Makes a built model from the shape of one example and the number of outputs, which are logits where it can be so."""


def mlp(input_shape: tuple[int, ...], n_classes: int) -> keras.Model:
    """Return a perceptron with two hidden layers of 128 units.

    Arguments:
        input_shape: of one example, such as (1, 28, 28).
        n_classes: width of the output, which are logits.
    """
    hidden = [_dense(128, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), *hidden, _dense(n_classes)])


def cnn(input_shape: tuple[int, ...], n_classes: int) -> keras.Model:
    """Return three convolutions with batch normalisation, each pooled, and a head with one hidden layer.

    Images come as [batch, channels, height, width], as they lie in the data; the convolutions see them with the
    channels last. Batch normalisation has the constants of PyTorch's (ε = 1e-5, running statistics that move by a
    tenth); what differs is that Keras' running variance is of n values, PyTorch's of n − 1.

    Arguments:
        input_shape: of one example: (channels, height, width), each side 8 or more.
        n_classes: width of the output, which are logits.

    Raises:
        DataError: the examples are no images, or smaller than 8 × 8.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < 8:
        raise DataError(f"cnn needs examples of (channels, height, width), each side 8 or more; got {input_shape}")
    blocks = [layer for width in (32, 64, 128) for layer in _block(width)]
    head = [layers.Flatten(), _dense(128, activation="relu"), _dense(n_classes)]
    return keras.Sequential([keras.Input(input_shape), layers.Permute((2, 3, 1)), *blocks, *head])


def fcn(input_shape: tuple[int, ...], n_classes: int) -> keras.Model:
    """Return five 3 × 3 convolutions of 32 channels with batch normalisation, and a dense layer on each pixel.

    Images come as [batch, channels, height, width], and batch normalisation is as in `cnn`. The outputs are
    [batch, height, width, n_classes]; a pixel's depend on the 11 × 11 around it.

    Arguments:
        input_shape: of one example: (channels, height, width).
        n_classes: numbers for each pixel, such as logits.

    Raises:
        DataError: the examples are no images.
    """
    if len(input_shape) != 3:
        raise DataError(f"fcn needs examples of (channels, height, width), got {input_shape}")
    blocks = [layer for _ in range(5) for layer in _convolution(32)]
    return keras.Sequential([keras.Input(input_shape), layers.Permute((2, 3, 1)), *blocks, _dense(n_classes)])


def _block(width: int) -> list[keras.layers.Layer]:
    return [*_convolution(width), layers.MaxPooling2D(2, data_format="channels_last")]


def _convolution(width: int) -> list[keras.layers.Layer]:
    return [
        layers.Conv2D(
            width, 3, padding="same", use_bias=False, data_format="channels_last", kernel_initializer=_initializer()
        ),
        layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
        layers.ReLU(),
    ]


def _dense(width: int, activation: str | None = None) -> keras.layers.Layer:
    return layers.Dense(width, activation=activation, kernel_initializer=_initializer())


def _initializer() -> keras.initializers.Initializer:
    return keras.initializers.VarianceScaling(1 / 3, mode="fan_in", distribution="uniform")


MODELS: dict[str, Factory] = {"mlp": mlp, "cnn": cnn, "fcn": fcn}
