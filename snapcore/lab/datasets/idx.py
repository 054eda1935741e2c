"""The four IDX files of MNIST and its kin, plain or gzipped: a magic number, the shape, the bytes."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from typing import TYPE_CHECKING

import numpy as np

from snapcore.errors import DataError
from snapcore.lab.datasets.arrays import Arrays, refuse_bomb
from snapcore.lab.files import open_regular

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_PARTS = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}


def spellings() -> dict[str, list[str]]:
    """Return the file names under which each of the four parts is looked for, the first one preferred."""
    return {
        part: [f"{part}{mark}idx{ndim}-ubyte{ending}" for mark in "-." for ending in ("", ".gz")]
        for part, ndim in _PARTS.items()
    }


def read_idx(files: dict[str, Path]) -> Arrays:
    """Read the four parts.

    Raises:
        DataError: a file cannot be read, or is not the IDX file it should be.
    """
    x_train, y_train, x_test, y_test = (_read(files[part], ndim) for part, ndim in _PARTS.items())
    return Arrays(x_train, y_train, x_test, y_test, loss="cross-entropy")


def _read(path: Path, ndim: int) -> NDArray[np.uint8]:
    try:
        with open_regular(path) as file:
            packed, zipped = os.fstat(file.fileno()).st_size, file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if zipped else file
            header = 4 + 4 * ndim
            head = stream.read(header)
            magic, got = bytes([0, 0, 8, ndim]), head[:4].hex(" ") or "an empty file"
            if head[:4] != magic:
                kind = f"IDX, unsigned bytes, {ndim} dimensions"
                raise DataError(f"{path} must begin with {magic.hex(' ')} ({kind}), got {got}: fetch it again")
            shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, header, 4)]
            promised, most = math.prod(shape), packed
            if zipped:
                refuse_bomb(path, promised, packed)
                most = promised
            pixels = stream.read(min(promised, most) + 1)  # the one more shows that there is more
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} must be a readable file, plain or gzip: {error}: fetch it again") from error
    size, found = header + promised, len(head) + len(pixels)
    if found != size:
        got = f"got {found} or more" if found > size else f"got {found}"
        raise DataError(f"{path} must have {size} bytes for the shape {shape} in its header, {got}: fetch it again")
    return np.frombuffer(pixels, np.uint8).reshape(shape)
