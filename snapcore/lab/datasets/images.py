"""One path for every data set: arrays are checked, scaled and standardised, and reach a model in the same form."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from snapcore.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Scale = float | NDArray[np.float64]


def as_inputs(x: NDArray[Any], y: NDArray[Any], what: str) -> NDArray[Any]:
    """Return vectors [n, features] and tokens [n, length] as they are, images as a view [n, channels, height, width].

    Raises:
        DataError: they are none of these.
    """
    if are_tokens(x, y) and x.size:
        if x.min() < 0:
            raise DataError(f"{what} tokens must be 0 or more, got {x.min()}: number them from 0")
        return x
    return x if x.ndim == 2 and x.dtype.kind == "f" and x.size else as_channels_first(x, what)


def are_tokens(x: NDArray[Any], y: NDArray[Any]) -> bool:
    """Return whether inputs are integers [n, length] with a class for each: numbers of words or characters.

    Integers with one class for all of a row may be images that were made flat.
    """
    return x.ndim == 2 and x.dtype.kind in "iu" and y.dtype.kind in "iu" and x.shape == y.shape


def as_channels_first(images: NDArray[Any], what: str) -> NDArray[Any]:
    """Return a view [n, channels, height, width].

    Raises:
        DataError: they are not numbers [n, height, width] or [n, height, width, channels].
    """
    got = f"got {images.dtype} {list(images.shape)}"
    if images.ndim not in {3, 4} or images.dtype.kind not in "iuf" or images.size == 0:
        shape = "[n, height, width] or [n, height, width, channels]"
        raise DataError(
            f"{what} images must be numbers {shape}, or floats [n, features], not empty, {got}: reshape them"
        )
    if images.ndim == 3:
        return images[:, None]
    if images.shape[1] in {1, 3} and images.shape[2] == images.shape[3] > 4:
        raise DataError(f"{what} images must have their channels last, {got}: move axis 1 to the end")
    return np.moveaxis(images, 3, 1)


def as_pixels(images: NDArray[Any], where: str) -> Floats:
    """Return float32, integers of 0..255 as 0..1, floats as they are.

    Raises:
        DataError: a value is not finite in float32, or an integer outside 0..255.
    """
    with np.errstate(over="ignore"):  # what is too large for float32 becomes inf, and is refused below
        scaled: Floats = np.ascontiguousarray(images, np.float32)
    if not np.isfinite(scaled).all():
        raise DataError(f"{where}: images must be finite in float32, got inf or NaN: repair them")
    if images.dtype.kind == "f":
        return scaled
    low, high = images.min(), images.max()
    if low < 0 or high > 255:
        valid = "pixels that are integers must be in 0..255"
        raise DataError(f"{where}: {valid}, got {low}..{high}: rescale them, or store floats")
    return scaled / np.float32(255)


def standardise(
    x_train: Floats, others: Sequence[Floats], where: str, *, alike: bool
) -> tuple[Floats, list[Floats], Scale, Scale]:
    """Return all parts as (x - mean) / std, and the mean and deviation of the training part.

    Args:
        x_train: images or vectors.
        others: parts that are scaled as it is.
        where: for messages.
        alike: whether one mean and one deviation are for all of an example, or else one for each feature of a vector.
            A feature that is the same in all of them becomes 0.

    Raises:
        DataError: all training pixels, or features, are the same.
    """
    if x_train.min() == x_train.max():
        what = "pixel" if x_train.ndim == 4 else "feature"
        flat = f"training {what}s must differ somewhere, got {x_train.flat[0]:g} in every {what}"
        raise DataError(f"{where}: {flat}: check the file, or raise train_limit")
    if alike or x_train.ndim == 4:
        mean, std = float(x_train.mean(dtype=np.float64)), float(x_train.std(dtype=np.float64))
        return (x_train - mean) / std, [(x - mean) / std for x in others], mean, std
    means, stds = x_train.mean(axis=0, dtype=np.float64), x_train.std(axis=0, dtype=np.float64)
    stds[stds == 0] = 1.0
    scaled = [((x - means) / stds).astype(np.float32) for x in (x_train, *others)]
    return scaled[0], scaled[1:], means, stds


def digest(*arrays: NDArray[Any]) -> str:
    """Return the SHA-256 of arrays' types, shapes and values, whatever the order of their bytes in memory."""
    content = hashlib.sha256()
    for array in arrays:
        little = array.dtype.newbyteorder("<")
        content.update(f"{little.str} {array.shape}".encode())
        content.update(np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data)
    return content.hexdigest()
