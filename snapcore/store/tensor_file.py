"""Safetensors files of named host arrays: written in one pass, and checked before they are read.

Names that share memory, such as tied weights, are stored once. The other names are in the file's metadata.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import ArrayLike

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store.atomic import atomic_write
from snapcore.store.files import open_regular
from snapcore.store.tensors import Array, Tensors

ALIASES = "aliases"
"""The metadata's key for the names whose values are stored under another name, as a JSON object."""

# The types that both safetensors and NumPy have; safetensors can write more than NumPy can read back.
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
_CODES = {dtype.name: code for code, dtype in _DTYPES.items()}
_LONGEST_HEADER = 32 * 2**20


def host_arrays(tensors: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Return the tensors as arrays that can be stored, in C order and little-endian; others are copied.

    Names that share memory get one and the same array.

    Raises:
        StoreError: a name is not text, or a type cannot be read back; the message names the tensor.
    """
    arrays: dict[str, Array] = {}
    # All sources are kept until the end: the memory of one that is freed could become that of the next.
    sources: list[Array] = []
    known: dict[tuple[Any, ...], Array] = {}
    for name, value in tensors.items():
        # A surrogate is half of a character, which UTF-8 cannot encode.
        if not isinstance(name, str) or name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name):
            raise StoreError(f"a tensor's name must be text other than '__metadata__', got {name!r}; rename it")
        try:
            source = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise StoreError(f"tensor {name!r} must be an array, got {type(value).__name__}: {error}") from error
        if source.dtype.name not in _CODES:
            raise StoreError(
                f"tensor {name!r} must be of a type that can be read back ({', '.join(sorted(_CODES))}), "
                f"got {source.dtype}; convert it"
            )
        sources.append(source)
        memory = (source.ctypes.data, source.shape, source.strides, source.dtype) if source.nbytes else (name,)
        if memory not in known:
            # Not ascontiguousarray, which makes 0-d arrays 1-d.
            known[memory] = np.asarray(source, _DTYPES[_CODES[source.dtype.name]], order="C")
        arrays[name] = known[memory]
    return arrays


def write_tensors(path: Path, arrays: Tensors, metadata: Mapping[str, str]) -> str:
    """Write a safetensors file and return its SHA-256.

    The writer of safetensors itself would leave a temporary file of its own when it is killed, hide the number of the
    system's error in a text, and have the file read again for its SHA-256.

    Arguments:
        path: where to.
        arrays: from `host_arrays`.
        metadata: text by name.

    Raises:
        StoreError: there are more names than a reader would take.
        OSError: it cannot be written.
    """
    first: dict[int, str] = {}
    aliases = {name: first[id(array)] for name, array in arrays.items() if first.setdefault(id(array), name) != name}
    # Wider types first, as safetensors orders them, so that each array starts at a multiple of its items' size.
    names = sorted(arrays.keys() - aliases.keys(), key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {**metadata, **({ALIASES: json.dumps(aliases)} if aliases else {})}}
    end = 0
    for name in names:
        array = arrays[name]
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype.name], "shape": array.shape, "data_offsets": (start, end)}
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise StoreError(
            f"names and shapes of {len(names):,} tensors are too long for one file; join some, or rename them"
        )
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    parts += [as_bytes(arrays[name]) for name in names]
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file whose header is checked.

    Arguments:
        file: to read from; open within `open_tensors` only.
        metadata: text by name.
        start: where the tensors' bytes begin.
        entries: the stored tensors by name, in the order of their bytes.
        aliases: the other names, and under which the tensor of each is stored.
    """

    file: BufferedReader
    metadata: dict[str, str]
    start: int
    entries: dict[str, _Entry]
    aliases: dict[str, str]

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file."""
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256").hexdigest()

    def read(self) -> tuple[dict[str, Array], str]:
        """Return the tensors as writable arrays, and the SHA-256 of the file as it was when they were read."""
        self.file.seek(0)
        digest = hashlib.sha256(self.file.read(self.start))
        arrays = {}
        for name, entry in self.entries.items():
            array = np.empty(entry.shape, _DTYPES[entry.dtype])
            if self.file.readinto(as_bytes(array)) != array.nbytes:
                raise ValueError("it became shorter while it was read")
            digest.update(as_bytes(array))
            arrays[name] = array
        return {**arrays, **{name: arrays[stored].copy() for name, stored in self.aliases.items()}}, digest.hexdigest()

    def map(self) -> dict[str, Array]:
        """Return the tensors as read-only arrays that are read when they are used; they outlive `file`."""
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays: dict[str, Array] = {
            name: np.ndarray(entry.shape, _DTYPES[entry.dtype], mapped, self.start + entry.data_offsets[0])
            for name, entry in self.entries.items()
        }
        return {**arrays, **{name: arrays[stored] for name, stored in self.aliases.items()}}


@contextmanager
def open_tensors(path: Path, *, follow: bool = False) -> Iterator[TensorFile]:
    """Open a safetensors file to read, and name it in whatever goes wrong until it is closed.

    Arguments:
        path: the file.
        follow: whether a link to a file will do.

    Raises:
        CorruptSnapshotError: it is not a whole safetensors file, or a tensor has a type that NumPy does not have.
        StoreError: it is not a regular file, cannot be read, or does not fit into memory.
        FileNotFoundError, NotADirectoryError: it does not exist.
    """
    try:
        with open_regular(path, follow=follow) as file:
            yield _read_header(file)
    except (StoreError, FileNotFoundError, NotADirectoryError):
        raise
    except MemoryError as error:
        raise StoreError(f"{path} does not fit into memory; load it on a larger machine") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}; check the disk") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptSnapshotError(f"{path} is not what was written: {error}; restore it") from error


def refuse_foreign(path: Path, is_ours: Callable[[dict[str, str]], bool]) -> None:
    """Raise `StoreError` if there is a file that a run must not replace.

    Arguments:
        path: where a run is about to write.
        is_ours: returns whether a file with this metadata is the run's own.
    """
    try:
        with open_tensors(path) as found:
            ours = is_ours(found.metadata)
    except FileNotFoundError:
        return
    except CorruptSnapshotError:
        ours = False
    if not ours:
        raise StoreError(f"{path} is not a file of this run, and is not overwritten; move it away")


def map_tensors(path: Path, *, copy: bool = False) -> dict[str, Array]:
    """Return the tensors of a safetensors file.

    Arguments:
        path: the file, such as `SnapshotStore.file` returns it.
        copy: False maps the file: nothing is read before it is used, and arrays change with the file if someone writes
            into it. True reads writable arrays.

    Raises:
        StoreError, CorruptSnapshotError: see `open_tensors`.
    """
    with _existing(path), open_tensors(path, follow=True) as opened:
        return opened.read()[0] if copy else opened.map()


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, text by name.

    Raises:
        StoreError, CorruptSnapshotError: see `open_tensors`.
    """
    with _existing(path), open_tensors(path, follow=True) as opened:
        return opened.metadata


def write_tensor_file(path: Path, tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        StoreError: it cannot be written; what was there is unchanged.
    """
    arrays = host_arrays(tensors)
    try:
        with atomic_write(path) as temporary:
            write_tensors(temporary, arrays, metadata)
    except StoreError:
        raise
    except OSError as error:
        size = sum(array.nbytes for array in arrays.values())
        reason = error.strerror or error
        raise StoreError(f"{path} could not be written, which needs {size} bytes: {reason}; choose another") from error


def tied_names(path: Path) -> dict[str, str]:
    """Return the names whose tensors are in a file under another name, for who reads it with safetensors alone.

    Raises:
        StoreError, CorruptSnapshotError: see `open_tensors`.
    """
    with _existing(path), open_tensors(path, follow=True) as opened:
        return opened.aliases


@contextmanager
def _existing(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{path} does not exist; check the path") from error


def as_bytes(array: Array) -> memoryview:
    """Return the memory of an array in C order as bytes, since buffers know no bfloat16."""
    return array.reshape(-1).view(np.uint8).data


def _read_header(file: BufferedReader) -> TensorFile:
    # All from the one file that is open: at its path there may be another by now, such as the next resume point.
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(_LONGEST_HEADER, size - 8):  # before anything is read: both numbers may be forged
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
    metadata = msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])
    found = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
    entries = dict(sorted(found.items(), key=lambda item: item[1].data_offsets))
    end = 0
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise ValueError(f"only {', '.join(_DTYPES)} can be read, got {entry.dtype}")
        start, stop = entry.data_offsets
        if start != end or stop - start != math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize:
            raise ValueError(f"{name!r} of shape {entry.shape} in bytes {start} to {stop}, after byte {end}")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"tensors of {end} bytes in a file that has {size - 8 - length} for them")
    aliases = msgspec.json.decode(metadata.get(ALIASES, "{}"), type=dict[str, str])
    for name, stored in aliases.items():
        # An alias of a stored name only: so there is neither a chain nor a circle, and shape and type are its own.
        if name in entries or stored not in entries:
            raise ValueError(f"{name!r} cannot be another name of {stored!r}")
    return TensorFile(file, metadata, 8 + length, entries, aliases)
