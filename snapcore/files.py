"""How bytes reach the disk and come back: whole or not at all, flushed, and never through pickle.

A file is written beside its final name, flushed to disk and renamed, so that a reader sees the old
file or the new one and a killed writer leaves nothing but a temporary file, which the next writer
sweeps away. Tensors are safetensors files. Nothing here knows what a run is.
"""

import hashlib
import mmap
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from snapcore.errors import StoreError

Array = np.ndarray[Any, np.dtype[Any]]

POSIX = os.name == "posix"
_TEMPORARY = ".tmp"  # safetensors' own temporary files begin so too, and one sweep finds both

# What safetensors calls each type that NumPy can also read back (it writes more than it reads).
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype("<i1"),
    "U8": np.dtype("<u1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
_READABLE = frozenset(dtype.name for dtype in _DTYPES.values())


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path to write; flush it and rename it to `target`, or leave no trace on an error.

    The file gets the mode that an ordinary `open` would give it, whatever the one who writes it sets.

    Raises:
        OSError: the file could not be created, flushed or renamed; `target` is as it was.
    """
    temporary = target.with_name(f"{_TEMPORARY}-{target.name}-{secrets.token_hex(4)}")
    try:
        mode = _create(temporary)
        yield temporary
        _flush(temporary, mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_directory(target.parent)


def _create(path: Path) -> int:
    """Create an empty file and tell the mode that the umask leaves it (reading the umask means setting it)."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _flush(path: Path, mode: int) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    if stat.S_IMODE(path.stat().st_mode) != mode:  # some network file systems refuse any chmod
        path.chmod(mode)


def _flush_directory(path: Path) -> None:
    if not POSIX:  # Windows cannot open a directory, and needs no such flush
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(directory: Path) -> None:
    """Delete the temporary files that killed writers left; only for who holds the directory's lock.

    Raises:
        OSError: one could not be deleted.
    """
    for path in directory.glob(f"{_TEMPORARY}*"):
        if path.is_symlink() or path.is_file():
            path.unlink()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_major(tensors: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Return the tensors as arrays that safetensors writes rightly, copying only those that need it.

    Raises:
        StoreError: no tensors, a name that is not plain text, or a type that cannot be read back;
            the message names the tensor.
    """
    if not tensors:
        raise StoreError("a snapshot needs at least one tensor, got none; pass the model's named arrays")
    return {_checked_name(name): _row_major(name, value) for name, value in tensors.items()}


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or name == "__metadata__" or not _is_unicode(name):
        raise StoreError(f"a tensor's name must be text other than '__metadata__', got {name!r}; rename it")
    return name


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _row_major(name: str, value: ArrayLike) -> Array:
    try:
        # safetensors writes any other order wrongly, in silence; ascontiguousarray makes 0-d arrays 1-d.
        array = np.asarray(value, order="C")
    except (TypeError, ValueError) as error:
        raise StoreError(f"tensor {name!r} must be an array, got {type(value).__name__}: {error}") from error
    if array.dtype.name not in _READABLE:
        raise StoreError(
            f"tensor {name!r} must be of a type that can be read back ({', '.join(sorted(_READABLE))}), "
            f"got {array.dtype}; convert it"
        )
    return array


def metadata(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata, once its header has been checked against the file's size.

    Raises:
        SafetensorError: the header is malformed, or does not cover the file exactly.
        OSError: the file cannot be read.
    """
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def map_tensors(path: Path) -> dict[str, Array]:
    """Map a safetensors file, whose header `metadata` has checked, as read-only arrays; nothing is copied.

    Raises:
        SafetensorError: a tensor is of a type that NumPy does not know.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = msgspec.json.decode(mapped[8:start], type=dict[str, dict[str, Any]])
    header.pop("__metadata__", None)
    unknown = {entry["dtype"] for entry in header.values()} - _DTYPES.keys()
    if unknown:
        raise SafetensorError(f"only {', '.join(_DTYPES)} can be read, got {', '.join(sorted(unknown))}")
    return {
        name: np.ndarray(entry["shape"], _DTYPES[entry["dtype"]], mapped, start + entry["data_offsets"][0])
        for name, entry in header.items()
    }
