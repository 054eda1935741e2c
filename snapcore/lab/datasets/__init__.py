"""The lab's images: scikit-learn's digits, folders of IDX files, `.npz` archives.

Three readers find the arrays; one path checks, scales and standardises them. The rest of the lab imports from here,
never from a file behind this door.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapcore.errors import DataError
from snapcore.lab.datasets.digits import read_digits
from snapcore.lab.datasets.idx import read_idx, spellings
from snapcore.lab.datasets.images import as_channels_first, as_labels, as_pixels, standardise
from snapcore.lab.datasets.npz import read_npz

if TYPE_CHECKING:
    import os

    import numpy as np
    from numpy.typing import NDArray

    from snapcore.lab.datasets.arrays import Arrays

    Directory = str | os.PathLike[str] | None

_INSTALLED = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
"""Where Debian's packages put the data sets that have a name here."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold a classification task, split and standardised: x = (pixel - mean) / std.

    `x_train`, `x_test` are float32 [n, channels, height, width], C-contiguous; `y_train`, `y_test` int64 [n]
    in 0..n_classes - 1. `mean` and `std` (scalars; a pixel stored as an integer counts as value / 255) come
    from the training images alone.
    """

    name: str
    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    n_classes: int
    mean: float
    std: float


def load_data(name: str = "digits", directory: Directory = None, *, train_limit: int | None = None) -> Dataset:
    """Load a data set by name or from a directory.

    Args:
        name: `digits` (1347 + 450 images of 8x8, embedded in scikit-learn; the split never changes),
            `fashion-mnist` (from Debian's package, or `directory`), or any label for what `directory` holds.
        directory: a folder with the four IDX files (`train-images-idx3-ubyte`, …, also `.gz`), a folder with
            exactly one `.npz`, or that file: keys as in Keras (`x_train`, …) or MedMNIST (`train_images`, …),
            images [n, height, width] or [n, height, width, channels]; integers 0..255, or floats taken as
            they are. Default: where `name` is installed.
        train_limit: keep only the first this many training images, 1..n. Default: all.

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
    x_train, x_test, mean, std = standardise(as_pixels(x_train[:n], where), as_pixels(x_test, where), where)
    n_classes = int(max(y_train.max(), y_test.max())) + 1
    return Dataset(name, x_train, y_train[:n], x_test, y_test, n_classes, mean, std)


def _read(name: str, directory: Directory) -> Arrays:
    if name == "digits":
        if directory is not None:
            raise DataError(f"digits comes with scikit-learn: give what {directory} holds another name")
        return read_digits()
    if directory is None and name not in _INSTALLED:
        known = ", ".join(["digits", *_INSTALLED])
        raise DataError(f"data must be one of {known}, or have a directory, got {name!r}: give its directory")
    path = _INSTALLED[name] if directory is None else Path(directory)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        hint = f"install Debian's package dataset-{name}, or " if directory is None else ""
        raise DataError(f"{name} must be in {path}, which does not exist: {hint}give the directory that has it")
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
