"""Digits to be found in a picture: two of scikit-learn's side by side, each pixel labelled by what it belongs to."""

import numpy as np
from numpy.typing import NDArray

from snapcore.lab.datasets.arrays import Arrays, seeded_order, seeded_raw
from snapcore.lab.datasets.digits import read_digits

IGNORE = 255
"""The label of pixels that count neither way."""

_SIDE = 8  # of a digit; a picture is twice as wide and as high
_INK = 0.5  # from here on a pixel belongs to the stroke; fainter ones are neither stroke nor background


def read_dense_digits() -> Arrays:
    """Return 1347 pictures of 16x16 to train on and 450 to test on, with a class for each pixel.

    A picture has each digit of `digits` once on its left, at a seeded height, and another one of the same part on its
    right. Background is 0 and a digit's stroke is its number + 1. Faint pixels, where stroke ends and background
    begins, are `IGNORE`.

    Raises:
        DataError: scikit-learn is not installed.
    """
    digits = read_digits()
    train = _pictures(digits.x_train, digits.y_train)
    test = _pictures(digits.x_test, digits.y_test)
    return Arrays(*train, *test, loss="cross-entropy", ignore=IGNORE)


def _pictures(digits: NDArray[np.float64], numbers: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    n = len(digits)
    pictures, labels = np.zeros((n, 2 * _SIDE, 2 * _SIDE)), np.zeros((n, 2 * _SIDE, 2 * _SIDE), np.int64)
    tops = (seeded_raw(2 * n) % np.uint64(_SIDE + 1)).astype(int).reshape(2, n)
    for column, (which, heights) in enumerate(zip((np.arange(n), seeded_order(n)), tops, strict=True)):
        across = slice(column * _SIDE, (column + 1) * _SIDE)
        for picture, (digit, top) in enumerate(zip(which, heights, strict=True)):
            ink, down = digits[digit], slice(top, top + _SIDE)
            pictures[picture, down, across] = ink
            faint = np.where(ink > 0, IGNORE, 0)
            labels[picture, down, across] = np.where(ink >= _INK, numbers[digit] + 1, faint)
    return pictures, labels
