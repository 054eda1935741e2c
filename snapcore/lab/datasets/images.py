"""One path for every data set: arrays are checked, scaled and standardised, and reach a model in the same form."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from snapcore.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Images = NDArray[np.float32]


def as_labels(labels: NDArray[Any], n_images: int, what: str) -> NDArray[np.int64]:
    """Return class numbers, int64 [n].

    Raises:
        DataError: they are not one class number, 0 or more, per image.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        got = f"got {labels.dtype} {list(labels.shape)}"
        raise DataError(f"{what} labels must be integers [n] or [n, 1], {got}: give one class number per image")
    if len(labels) != n_images:
        count = f"{n_images} images and {len(labels)} labels"
        raise DataError(f"{what} part must have one label per image, got {count}: complete it")
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise DataError(f"{what} labels must be 0 or more, got {labels.min()}: number the classes from 0")
    return labels


def as_channels_first(images: NDArray[Any], what: str) -> NDArray[Any]:
    """Return a view [n, channels, height, width].

    Raises:
        DataError: they are not numbers [n, height, width] or [n, height, width, channels].
    """
    got = f"got {images.dtype} {list(images.shape)}"
    if images.ndim not in {3, 4} or images.dtype.kind not in "iuf" or images.size == 0:
        shape = "[n, height, width] or [n, height, width, channels]"
        raise DataError(f"{what} images must be numbers {shape}, not empty, {got}: reshape them")
    if images.ndim == 3:
        return images[:, None]
    if images.shape[1] in {1, 3} and images.shape[2] == images.shape[3] > 4:
        raise DataError(f"{what} images must have their channels last, {got}: move axis 1 to the end")
    return np.moveaxis(images, 3, 1)


def as_pixels(images: NDArray[Any], where: str) -> Images:
    """Return float32, integers of 0..255 as 0..1.

    Raises:
        DataError: a value is not finite in float32, or an integer outside 0..255.
    """
    with np.errstate(over="ignore"):  # what is too large for float32 becomes inf, and is refused below
        scaled: Images = np.ascontiguousarray(images, np.float32)
    if not np.isfinite(scaled).all():
        raise DataError(f"{where}: images must be finite in float32, got inf or NaN: repair them")
    if images.dtype.kind == "f":
        return scaled
    low, high = images.min(), images.max()
    if low < 0 or high > 255:
        valid = "pixels that are integers must be in 0..255"
        raise DataError(f"{where}: {valid}, got {low}..{high}: rescale them, or store floats")
    return scaled / np.float32(255)


def standardise(x_train: Images, others: Sequence[Images], where: str) -> tuple[Images, list[Images], float, float]:
    """Return all parts as (pixel - mean) / std, and the mean and deviation of the training part.

    Raises:
        DataError: all training pixels are the same.
    """
    if x_train.min() == x_train.max():
        flat = f"training images must differ somewhere, got {x_train.flat[0]:g} in every pixel"
        raise DataError(f"{where}: {flat}: check the file, or raise train_limit")
    mean, std = float(x_train.mean(dtype=np.float64)), float(x_train.std(dtype=np.float64))
    return (x_train - mean) / std, [(x - mean) / std for x in others], mean, std


def digest(*arrays: NDArray[Any]) -> str:
    """Return the SHA-256 of arrays' types, shapes and values, whatever the order of their bytes in memory."""
    content = hashlib.sha256()
    for array in arrays:
        little = array.dtype.newbyteorder("<")
        content.update(f"{little.str} {array.shape}".encode())
        content.update(np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data)
    return content.hexdigest()
