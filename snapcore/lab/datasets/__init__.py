"""The lab's images: scikit-learn's digits, folders of IDX files, `.npz` archives.

Three readers find the arrays; one path checks, scales and standardises them. The rest of the lab imports from here,
never from a file behind this door.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snapcore.errors import DataError
from snapcore.lab.datasets.digits import read_digits
from snapcore.lab.datasets.idx import read_idx, spellings
from snapcore.lab.datasets.images import as_channels_first, as_labels, as_pixels, digest, standardise
from snapcore.lab.datasets.npz import read_npz

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from snapcore.lab.datasets.arrays import Arrays

    Directory = str | os.PathLike[str] | None

_INSTALLED = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
"""Where Debian's packages put the data sets that have a name here."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold a classification task, split and standardised: x = (pixel - mean) / std.

    `x_train`, `x_test` and `x_held_out`, which may be empty, are float32 [n, channels, height, width], C-contiguous;
    their labels int64 [n] in 0..n_classes - 1. `mean` and `std` (scalars; a pixel stored as an integer counts as
    value / 255) come from the training images alone. `sha256` is the digest of images and labels as they are stored.
    """

    name: str
    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    n_classes: int
    mean: float
    std: float
    sha256: str
    x_held_out: NDArray[np.float32]
    y_held_out: NDArray[np.int64]


def load_data(
    name: str = "digits",
    directory: Directory = None,
    *,
    train_limit: int | None = None,
    held_out: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Load a data set by name or from a directory.

    Args:
        name: `digits` (1347 + 450 images of 8x8, embedded in scikit-learn; the split never changes),
            `fashion-mnist` (from Debian's package, or `directory`), or any label for what `directory` holds.
        directory: a folder with the four IDX files (`train-images-idx3-ubyte`, …, also `.gz`), a folder with
            exactly one `.npz`, or that file: keys as in Keras (`x_train`, …) or MedMNIST (`train_images`, …),
            images [n, height, width] or [n, height, width, channels]; integers 0..255, or floats taken as
            they are. Default: where `name` is installed.
        train_limit: keep only the first this many training images, 1..n. Default: all.
        held_out: the share of these that is not trained on, 0 <= share < 1; the same of each class.
        seed: decides which.

    Returns:
        A `Dataset`, standardised by the training images that are kept.

    Raises:
        DataError: for an unknown name, missing or damaged files, and arrays that are not images and labels.

    Example:
        >>> data = load_data("digits")
        >>> data.x_train.shape, data.x_test.shape, data.n_classes
        ((1347, 1, 8, 8), (450, 1, 8, 8), 10)
    """
    arrays = _read(name, directory)
    where = name if directory is None else f"{name} in {directory}"
    x_train = as_channels_first(arrays.x_train, f"{where}: training")
    x_test = as_channels_first(arrays.x_test, f"{where}: test")
    y_train = as_labels(arrays.y_train, len(x_train), f"{where}: training")
    y_test = as_labels(arrays.y_test, len(x_test), f"{where}: test")
    n = len(y_train) if train_limit is None else train_limit
    if not 1 <= n <= len(y_train):
        raise DataError(f"train_limit must be in 1..{len(y_train)}, the training images, got {n}")
    kinds = [f"{x.dtype} {list(x.shape[1:])}" for x in (x_train, x_test)]
    if kinds[0] != kinds[1]:
        alike = "training and test images must have one type and shape"
        raise DataError(f"{where}: {alike}, got {' and '.join(kinds)}: convert them alike")
    x_train, y_train, n_classes = x_train[:n], y_train[:n], int(max(y_train.max(), y_test.max())) + 1
    # Of what is stored: the last bits of a mean differ between one machine's NumPy and another's.
    sha256 = digest(x_train, y_train, x_test, y_test)
    kept_back = _held_out(y_train, held_out, seed, where)
    x_train, x_held_out, y_train, y_held_out = (
        part for array in (x_train, y_train) for part in (array[~kept_back], array[kept_back])
    )
    pixels = [as_pixels(x, where) for x in (x_train, x_test)]
    others = as_pixels(x_held_out, where) if len(x_held_out) else np.empty((0, *pixels[0].shape[1:]), np.float32)
    x_train, (x_test, x_held_out), mean, std = standardise(pixels[0], (pixels[1], others), where)
    return Dataset(name, x_train, y_train, x_test, y_test, n_classes, mean, std, sha256, x_held_out, y_held_out)


def _held_out(labels: NDArray[np.int64], share: float, seed: int, where: str) -> NDArray[np.bool_]:
    """Return which images are kept back: of each class, whose images are shuffled, the first `share`."""
    if not 0 <= share < 1:
        raise DataError(f"held_out must be a share in 0..1, 1 excluded, got {share}: 0.1 is customary")
    kept_back = np.zeros(len(labels), bool)
    for number in np.unique(labels):
        of_class = np.random.default_rng([seed, int(number)]).permutation(np.flatnonzero(labels == number))
        kept_back[of_class[: round(share * len(of_class))]] = True
    if share and not kept_back.any():
        raise DataError(f"{where}: held_out={share} keeps none of {len(labels)} images back: raise it")
    if kept_back.all():
        raise DataError(f"{where}: held_out={share} leaves no image to train on: lower it")
    return kept_back


def _read(name: str, directory: Directory) -> Arrays:
    if name == "digits":
        if directory is not None:
            raise DataError(f"digits comes with scikit-learn: give what {directory} holds another name")
        return read_digits()
    if directory is None and name not in _INSTALLED:
        known = ", ".join(["digits", *_INSTALLED])
        raise DataError(
            f"data must be one of {known}, or have a directory, got {name!r}: give its directory as --data-dir"
        )
    path = _INSTALLED[name] if directory is None else Path(directory)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        hint = f"install Debian's package dataset-{name}, or " if directory is None else ""
        raise DataError(
            f"{name} must be in {path}, which does not exist: {hint}give the directory that has it as --data-dir"
        )
    return read_npz(path)


def _read_folder(folder: Path) -> Arrays:
    names = spellings()
    # Reversed, so that the first spelling has the last word.
    found = {part: folder / name for part in names for name in reversed(names[part]) if (folder / name).is_file()}
    archives = list(folder.glob("*.npz"))
    if not found and len(archives) == 1:
        return read_npz(archives[0])
    lacking = "; ".join("|".join(names[part]) for part in names if part not in found)
    if lacking:
        raise DataError(
            f"{folder} must hold four IDX files, or exactly one .npz file (it has {len(archives)}); not there: "
            f"{lacking}: complete it, or give the .npz file itself"
        )
    return read_idx(found)
