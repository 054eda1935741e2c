"""One `.npz` archive with the arrays of Keras or of MedMNIST. Nothing is unpickled: a data file is never code."""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from snapcore.errors import DataError
from snapcore.lab.datasets.arrays import Arrays, refuse_bomb
from snapcore.lab.files import open_regular

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_LAYOUTS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_NO_HEADER = (SyntaxError, tokenize.TokenError, MemoryError)  # what NumPy lets through of a header that is no literal
_SHOWN = 8  # names of arrays in a message
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile, *_NO_HEADER)


def read_npz(path: Path) -> Arrays:
    """Read an archive.

    Raises:
        DataError: it is none, cannot be read, or has other arrays.
    """
    try:
        with open_regular(path) as file:
            if not zipfile.is_zipfile(file):
                raise DataError(f"{path} must be a .npz file or a folder, and is neither: give one of them")
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                held = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
                for layout in _LAYOUTS:
                    if set(held) >= set(layout):
                        x, y, x_test, y_test = (_read(path, archive, f"{key}.npy", size) for key in layout)
                        ignore = _read(path, archive, "ignore.npy", size) if "ignore" in held else None
                        return Arrays(x, y, x_test, y_test, ignore=None if ignore is None else _number(path, ignore))
    except _UNREADABLE as error:
        raise DataError(f"{path} must be a .npz file of plain arrays: {error}: save it again as one") from error
    wanted, got = ", or ".join(" ".join(layout) for layout in _LAYOUTS), " ".join(held[:_SHOWN]) or "none"
    raise DataError(f"{path} must be a .npz file with {wanted}; got {got}: rename its arrays")


def _number(path: Path, ignore: NDArray[Any]) -> int:
    """Return the class number of what does not count."""
    if ignore.size != 1 or ignore.dtype.kind not in "iu":
        raise DataError(f"{path}: ignore must be one class number, got {ignore.dtype} {list(ignore.shape)}")
    return int(ignore.reshape(()))


def _read(path: Path, archive: zipfile.ZipFile, name: str, size: int) -> NDArray[Any]:
    """Return an array whose size is first found to be what it says in three places: the archive, its header, its data.

    Arguments:
        path: of the archive.
        archive: opened.
        name: of the array's file in it.
        size: bytes of the whole archive.
    """
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed in a way that NumPy does not use")
    refuse_bomb(path, info.file_size, min(info.compress_size, size))
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"{name} has version {version} of NumPy's format")
        shape, _, dtype = _HEADERS[version](member)
        claimed = member.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and claimed != info.file_size:
        raise ValueError(f"{name} must have {claimed} bytes for the shape {list(shape)}, got {info.file_size}")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
