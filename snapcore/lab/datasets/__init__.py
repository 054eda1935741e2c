"""Where the lab's images come from: scikit-learn's digits, folders of IDX files, `.npz` archives.

Three readers find the arrays; one path checks, scales and standardises them, so that every data set
reaches a model in the same form. Nothing is unpickled: a data file is never code.
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from snapcore.errors import DataError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    AnyArray = NDArray[Any]
    Directory = str | os.PathLike[str] | None

_DEFAULT_PLACES = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
_IDX_PARTS = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}
_NPZ_LAYOUTS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile)
_DIGITS_TEST_SIZE = 450


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


class _Raw(NamedTuple):
    x_train: AnyArray
    y_train: AnyArray
    x_test: AnyArray
    y_test: AnyArray


def load_data(name: str = "digits", directory: Directory = None, *, train_limit: int | None = None) -> Dataset:
    """Load a data set by name or from a directory.

    Args:
        name: `digits` (1347 + 450 images of 8x8, embedded in scikit-learn; the split never changes),
            `fashion-mnist` (from Debian's package, or `directory`), or any label for what `directory` holds.
        directory: a folder with the four IDX files (`train-images-idx3-ubyte`, …, also `.gz`), a folder with
            exactly one `.npz`, or that file: keys as in Keras (`x_train`, …) or MedMNIST (`train_images`, …),
            images [n, height, width] or [n, height, width, channels]; integers 0..255, or floats taken as
            they are. Default: the known place of `name`.
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
    raw = _read(name, directory)
    where = name if directory is None else f"{name} in {directory}"
    x_train, x_test = _images(raw.x_train, f"{where}: training"), _images(raw.x_test, f"{where}: test")
    y_train = _labels(raw.y_train, len(x_train), f"{where}: training")
    y_test = _labels(raw.y_test, len(x_test), f"{where}: test")
    n = len(y_train) if train_limit is None else train_limit
    _require(1 <= n <= len(y_train), f"train_limit must be in 1..{len(y_train)}, the training images, got {n}")
    kinds = [f"{x.dtype} {list(x.shape[1:])}" for x in (x_train, x_test)]
    alike = "training and test images must have one type and shape"
    _require(kinds[0] == kinds[1], f"{where}: {alike}, got {' and '.join(kinds)}: convert them alike")
    x_train, x_test, mean, std = _standardised(_scaled(x_train[:n], where), _scaled(x_test, where), where)
    n_classes = int(max(y_train.max(), y_test.max())) + 1
    return Dataset(name, x_train, y_train[:n], x_test, y_test, n_classes, mean, std)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise DataError(message)


def _read(name: str, directory: Directory) -> _Raw:
    if name == "digits":
        _require(directory is None, f"digits comes with scikit-learn: give what {directory} holds another name")
        return _read_digits()
    if directory is None and name not in _DEFAULT_PLACES:
        known = ", ".join(["digits", *_DEFAULT_PLACES])
        raise DataError(f"data must be one of {known}, or have a directory, got {name!r}: give its directory")
    path = _DEFAULT_PLACES[name] if directory is None else Path(directory)
    if path.is_dir():
        return _read_folder(path)
    hint = f"install Debian's package dataset-{name}, or " if directory is None else ""
    _require(path.exists(), f"{name} must be in {path}, which does not exist: {hint}give the directory that has it")
    return _read_npz(path)


def _read_digits() -> _Raw:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise DataError("digits needs scikit-learn: pip install 'snapcore[lab]'") from error
    pixels, labels = load_digits(return_X_y=True)
    images, labels = np.reshape(pixels, (-1, 8, 8)) / 16, np.asarray(labels)
    # NumPy promises the raw stream for ever, but not what `permutation` makes of it.
    order = np.argsort(np.random.PCG64(2017).random_raw(len(images)), kind="stable")
    test, train = order[:_DIGITS_TEST_SIZE], order[_DIGITS_TEST_SIZE:]
    return _Raw(images[train], labels[train], images[test], labels[test])


def _read_folder(folder: Path) -> _Raw:
    names = {part: _spellings(part) for part in _IDX_PARTS}
    # Reversed, so that the first spelling has the last word.
    found = {part: folder / name for part in names for name in reversed(names[part]) if (folder / name).is_file()}
    archives = list(folder.glob("*.npz"))
    if not found and len(archives) == 1:
        return _read_npz(archives[0])
    lacking = "; ".join(" or ".join(names[part]) for part in names if part not in found)
    _require(
        not lacking,
        f"{folder} must hold four IDX files, or else exactly one .npz file (it has {len(archives)});"
        f" not there: {lacking}: complete it, or give the .npz file itself",
    )
    return _Raw(*(_read_idx(found[part], ndim) for part, ndim in _IDX_PARTS.items()))


def _spellings(part: str) -> list[str]:
    return [f"{part}{mark}idx{_IDX_PARTS[part]}-ubyte{ending}" for mark in "-." for ending in ("", ".gz")]


def _read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except _UNREADABLE as error:
        raise DataError(f"{path} must be a readable file, plain or gzip: {error}: fetch it again") from error
    magic, header, got = bytes([0, 0, 8, ndim]), 4 + 4 * ndim, content[:4].hex(" ") or "an empty file"
    kind = f"IDX, unsigned bytes, {ndim} dimensions"
    _require(content[:4] == magic, f"{path} must begin with {magic.hex(' ')} ({kind}), got {got}: fetch it again")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    size = header + math.prod(shape)
    cause = f"{path} must have {size} bytes for the shape {shape} in its header, got {len(content)}"
    _require(len(content) == size, f"{cause}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_npz(path: Path) -> _Raw:
    _require(zipfile.is_zipfile(path), f"{path} must be a .npz file or a folder, and is neither: give one of them")
    known = {key for layout in _NPZ_LAYOUTS for key in layout}
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            held = archive.files if isinstance(archive, np.lib.npyio.NpzFile) else []
            arrays = {key: np.asarray(archive[key]) for key in held if key in known}
    except _UNREADABLE as error:
        raise DataError(f"{path} must be a .npz file of plain arrays: {error}: save it again as one") from error
    for layout in _NPZ_LAYOUTS:
        if arrays.keys() >= set(layout):
            return _Raw(*(arrays[key] for key in layout))
    wanted = ", or ".join(" ".join(layout) for layout in _NPZ_LAYOUTS)
    raise DataError(f"{path} must be a .npz file with {wanted}; got {' '.join(held) or 'none'}: rename its arrays")


def _labels(labels: AnyArray, n_images: int, what: str) -> NDArray[np.int64]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    got = f"got {labels.dtype} {list(labels.shape)}"
    whole = labels.ndim == 1 and labels.dtype.kind in "iu"
    _require(whole, f"{what} labels must be integers [n] or [n, 1], {got}: give one class number per image")
    count = f"{n_images} images and {len(labels)} labels"
    _require(len(labels) == n_images, f"{what} part must have one label per image, got {count}: complete it")
    labels = labels.astype(np.int64)
    _require(labels.min() >= 0, f"{what} labels must be 0 or more, got {labels.min()}: number the classes from 0")
    return labels


def _images(images: AnyArray, what: str) -> AnyArray:
    """Return a view [n, channels, height, width]."""
    got = f"got {images.dtype} {list(images.shape)}"
    usable = images.ndim in {3, 4} and images.dtype.kind in "iuf" and images.size > 0
    shape = "[n, height, width] or [n, height, width, channels]"
    _require(usable, f"{what} images must be numbers {shape}, not empty, {got}: reshape them")
    if images.ndim == 3:
        return images[:, None]
    first = images.shape[1] in {1, 3} and images.shape[2] == images.shape[3] > 4
    _require(not first, f"{what} images must have their channels last, {got}: move axis 1 to the end")
    return np.moveaxis(images, 3, 1)


def _scaled(images: AnyArray, where: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what is too large for float32 becomes inf, and is refused below
        scaled: NDArray[np.float32] = np.ascontiguousarray(images, np.float32)
    _require(bool(np.isfinite(scaled).all()), f"{where}: images must be finite in float32, got inf or NaN: repair them")
    if images.dtype.kind == "f":
        return scaled
    low, high = images.min(), images.max()
    valid = "pixels that are integers must be in 0..255"
    _require(low >= 0 and high <= 255, f"{where}: {valid}, got {low}..{high}: rescale them, or store floats")
    return scaled / np.float32(255)


def _standardised(
    x_train: NDArray[np.float32], x_test: NDArray[np.float32], where: str
) -> tuple[NDArray[np.float32], NDArray[np.float32], float, float]:
    flat = f"{where}: training images must differ somewhere, got {x_train.flat[0]:g} in every pixel"
    _require(bool(x_train.min() < x_train.max()), f"{flat}: check the file, or raise train_limit")
    mean, std = float(x_train.mean(dtype=np.float64)), float(x_train.std(dtype=np.float64))
    return (x_train - mean) / std, (x_test - mean) / std, mean, std
