"""The lab's data: images in folders of IDX files and `.npz` archives, scikit-learn's digits, a table, rated texts.

A reader finds the arrays; one path checks, scales and standardises them. The rest of the lab imports from here,
never from a file behind this door.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snapcore.data import LOSSES
from snapcore.errors import DataError
from snapcore.lab.datasets.dense import read_dense_digits
from snapcore.lab.datasets.digits import read_digits
from snapcore.lab.datasets.idx import read_idx, spellings
from snapcore.lab.datasets.images import are_tokens, as_inputs, as_pixels, digest, standardise
from snapcore.lab.datasets.npz import read_npz
from snapcore.lab.datasets.randhie import read_randhie
from snapcore.lab.datasets.targets import as_targets, count_outputs, held_out_rows, loss_of
from snapcore.lab.datasets.vader import read_vader

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import NDArray

    from snapcore.lab.datasets.arrays import Arrays

    Directory = str | os.PathLike[str] | None

_INSTALLED = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
"""Where Debian's packages put the data sets that have a name here."""


_EMBEDDED: dict[str, Callable[[], Arrays]] = {"digits": read_digits, "digits-dense": read_dense_digits}
"""Those that come with scikit-learn."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold a task, split and standardised: x = (x - mean) / std.

    `x_train`, `x_test` and `x_held_out`, which may be empty, are float32, C-contiguous: images [n, channels, height,
    width], or vectors [n, features]; or int64 tokens [n, length], as they are stored. Their labels are for classes
    int64 [n], or one for each pixel or token, in 0..n_classes - 1 or `ignore`; for labels int64 [n, n_classes] of 0 and
    1; for values and gaussian float32 [n], or [n, n_classes] where there are several. `mean` and `std` come from the
    training part alone: of all pixels (a pixel stored as an integer counts as value / 255), or of each feature,
    [features]. `sha256` is the digest of what is stored. `loss` names what to train with, and with it the `kind` of
    task. `spread` is how far apart people were on each example of the test part, [n], where that is known.
    """

    name: str
    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    n_classes: int
    mean: float | NDArray[np.float64]
    std: float | NDArray[np.float64]
    sha256: str
    x_held_out: NDArray[Any]
    y_held_out: NDArray[Any]
    loss: str = "cross-entropy"
    ignore: int | None = None
    spread: NDArray[np.float64] | None = None

    @property
    def kind(self) -> str:
        """What a model predicts: one of `snapcore.ensemble.KINDS`."""
        return LOSSES[self.loss]

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes between examples and outputs, such as (height, width) where every pixel has a class; else none."""
        return self.y_test.shape[1:] if self.kind == "classes" else ()

    @property
    def noun(self) -> str:
        """What one of the examples is called."""
        return "image" if self.x_train.ndim == 4 else "example"


def load_data(
    name: str = "digits",
    directory: Directory = None,
    *,
    loss: str | None = None,
    train_limit: int | None = None,
    held_out: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Load a data set by name or from a directory.

    Args:
        name: `digits` (1347 + 450 images of 8x8, embedded in scikit-learn; the split never changes), `digits-dense`
            (two of them in a picture, and a class for each pixel), `fashion-mnist` (from Debian's package, or
            `directory`), `randhie` (a table, from statsmodels or `directory`), `vader` (texts with people's ratings,
            `directory` being vaderSentiment's sdist), or any label for what `directory` holds.
        directory: a folder with the four IDX files (`train-images-idx3-ubyte`, …, also `.gz`), a folder with
            exactly one `.npz`, or that file: keys as in Keras (`x_train`, …) or MedMNIST (`train_images`, …),
            images [n, height, width] or [n, height, width, channels]; integers 0..255, or floats taken as
            they are; or vectors, floats [n, features]. Default: where `name` is installed.
        loss: one of `snapcore.data.LOSSES`. Default: what the data are for; of an `.npz` archive whose labels are
            floats `squared-error`, whose labels are [n, labels] of 0 and 1 `binary-cross-entropy`.
        train_limit: keep only the first this many training images, 1..n. Default: all.
        held_out: the share of these that is not trained on, 0 <= share < 1; the same of each class.
        seed: decides which.

    Returns:
        A `Dataset`, standardised by the training images that are kept.

    Raises:
        DataError: for an unknown name, missing or damaged files, and arrays that are not examples and labels.

    Example:
        >>> data = load_data("digits")
        >>> data.x_train.shape, data.x_test.shape, data.n_classes
        ((1347, 1, 8, 8), (450, 1, 8, 8), 10)
    """
    arrays = _read(name, directory)
    where = name if directory is None else f"{name} in {directory}"
    x_train = as_inputs(arrays.x_train, arrays.y_train, f"{where}: training")
    x_test = as_inputs(arrays.x_test, arrays.y_test, f"{where}: test")
    loss = loss_of(arrays, loss, where)
    y_train, y_test = as_targets(arrays, LOSSES[loss], where)
    n = len(y_train) if train_limit is None else train_limit
    if not 1 <= n <= len(y_train):
        raise DataError(f"train_limit must be in 1..{len(y_train)}, the training examples, got {n}")
    kinds = [f"{x.dtype} {list(x.shape[1:])}" for x in (x_train, x_test)]
    if kinds[0] != kinds[1]:
        alike = "training and test inputs must have one type and shape"
        raise DataError(f"{where}: {alike}, got {' and '.join(kinds)}: convert them alike")
    n_classes = count_outputs(LOSSES[loss], y_train, y_test, arrays.ignore)
    x_train, y_train = x_train[:n], y_train[:n]
    # Of what is stored: the last bits of a mean differ between one machine's NumPy and another's.
    sha256 = digest(x_train, y_train, x_test, y_test)
    stratified = loss == "cross-entropy" and y_train.ndim == 1
    kept_back = held_out_rows(y_train, held_out, seed, where, stratified=stratified)
    x_train, x_held_out, y_train, y_held_out = (
        part for array in (x_train, y_train) for part in (array[~kept_back], array[kept_back])
    )
    mean: Any = 0.0
    std: Any = 1.0
    if are_tokens(arrays.x_train, arrays.y_train):
        x_train, x_test, x_held_out = (np.ascontiguousarray(x, np.int64) for x in (x_train, x_test, x_held_out))
    else:
        pixels = [as_pixels(x, where) for x in (x_train, x_test)]
        others = as_pixels(x_held_out, where) if len(x_held_out) else np.empty((0, *pixels[0].shape[1:]), np.float32)
        x_train, (x_test, x_held_out), mean, std = standardise(
            pixels[0], (pixels[1], others), where, alike=arrays.alike
        )
    facts = (n_classes, mean, std, sha256, x_held_out, y_held_out, loss, arrays.ignore, arrays.spread)
    return Dataset(name, x_train, y_train, x_test, y_test, *facts)


def _read(name: str, directory: Directory) -> Arrays:
    if name in _EMBEDDED:
        if directory is not None:
            raise DataError(f"{name} comes with scikit-learn: give what {directory} holds another name")
        return _EMBEDDED[name]()
    if name == "randhie":
        return read_randhie(directory)
    if name == "vader":
        if directory is None:
            raise DataError("vader is in the sdist of vaderSentiment 3.3.2: give that .tar.gz as --data-dir")
        return read_vader(Path(directory))
    if directory is None and name not in _INSTALLED:
        known = ", ".join([*_EMBEDDED, *_INSTALLED, "randhie", "vader"])
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
