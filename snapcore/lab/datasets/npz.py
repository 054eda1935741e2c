"""One `.npz` archive with the arrays of Keras or of MedMNIST. Nothing is unpickled: a data file is never code."""

from __future__ import annotations

import zipfile
import zlib
from typing import TYPE_CHECKING

import numpy as np

from snapcore.errors import DataError
from snapcore.lab.datasets.arrays import Arrays

if TYPE_CHECKING:
    from pathlib import Path

_LAYOUTS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile)


def read_npz(path: Path) -> Arrays:
    """Read an archive.

    Raises:
        DataError: it is none, cannot be read, or has other arrays.
    """
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} must be a .npz file or a folder, and is neither: give one of them")
    known = {key for layout in _LAYOUTS for key in layout}
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            held = archive.files if isinstance(archive, np.lib.npyio.NpzFile) else []
            arrays = {key: np.asarray(archive[key]) for key in held if key in known}
    except _UNREADABLE as error:
        raise DataError(f"{path} must be a .npz file of plain arrays: {error}: save it again as one") from error
    for layout in _LAYOUTS:
        if arrays.keys() >= set(layout):
            return Arrays(*(arrays[key] for key in layout))
    wanted = ", or ".join(" ".join(layout) for layout in _LAYOUTS)
    raise DataError(f"{path} must be a .npz file with {wanted}; got {' '.join(held) or 'none'}: rename its arrays")
