"""The four IDX files of MNIST and its kin, plain or gzipped: a magic number, the shape, the bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from typing import TYPE_CHECKING

import numpy as np

from snapcore.errors import DataError
from snapcore.lab.datasets.arrays import Arrays

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
    return Arrays(*(_read(files[part], ndim) for part, ndim in _PARTS.items()))


def _read(path: Path, ndim: int) -> NDArray[np.uint8]:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} must be a readable file, plain or gzip: {error}: fetch it again") from error
    magic, got = bytes([0, 0, 8, ndim]), content[:4].hex(" ") or "an empty file"
    if content[:4] != magic:
        kind = f"IDX, unsigned bytes, {ndim} dimensions"
        raise DataError(f"{path} must begin with {magic.hex(' ')} ({kind}), got {got}: fetch it again")
    header = 4 + 4 * ndim
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    size = header + math.prod(shape)
    if len(content) != size:
        cause = f"{path} must have {size} bytes for the shape {shape} in its header, got {len(content)}"
        raise DataError(f"{cause}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
