"""Named host arrays: which can be stored as safetensors, which are finite, and which fit a model."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open

from snapcore.errors import DataError, DivergedError, StoreError

Array = NDArray[Any]
Tensors = Mapping[str, Array]

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
_READABLE = frozenset(dtype.name for dtype in _DTYPES.values())


def row_major(tensors: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Return the tensors as arrays in C order, copying only those that are not.

    Raises:
        StoreError: there are no tensors, a name is not text, or a type cannot be read back; the message names the
            tensor.
    """
    if not tensors:
        raise StoreError("a snapshot needs at least one tensor, got none; pass the model's named arrays")
    arrays = {}
    for name, value in tensors.items():
        # A surrogate is half of a character, which UTF-8 cannot encode.
        if not isinstance(name, str) or name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name):
            raise StoreError(f"a tensor's name must be text other than '__metadata__', got {name!r}; rename it")
        try:
            # safetensors takes any other order for this one, and writes wrong values without an error. Not
            # ascontiguousarray, which makes 0-d arrays 1-d.
            array = np.asarray(value, order="C")
        except (TypeError, ValueError) as error:
            raise StoreError(f"tensor {name!r} must be an array, got {type(value).__name__}: {error}") from error
        if array.dtype.name not in _READABLE:
            raise StoreError(
                f"tensor {name!r} must be of a type that can be read back ({', '.join(sorted(_READABLE))}), "
                f"got {array.dtype}; convert it"
            )
        arrays[name] = array
    return arrays


def read_metadata(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata; its header must describe a file of exactly this size.

    Raises:
        SafetensorError: the header is malformed, or the file has another size.
        OSError: the file cannot be read.
    """
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def map_tensors(path: Path) -> dict[str, Array]:
    """Map a safetensors file, whose header `read_metadata` has checked, as read-only arrays; nothing is copied.

    Raises:
        SafetensorError: a tensor is of a type that NumPy does not have.
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


def check_finite(tensors: Tensors, what: str) -> None:
    """Raise `DivergedError` if a floating tensor has NaN or +inf, naming it and `what` it is part of.

    -inf is accepted: causal masks consist of it, and weights that overflow also have NaN or +inf.
    """
    for name, array in tensors.items():
        if not np.issubdtype(array.dtype, np.inexact) and array.dtype.name != "bfloat16":
            continue
        if not np.isfinite(array).all():
            bad = int(np.count_nonzero(np.isnan(array) | np.isposinf(np.real(array)) | np.isposinf(np.imag(array))))
            if bad:
                raise DivergedError(
                    f"{what} is refused: {bad} of {array.size} values of {name!r} are not finite. Lower the learning "
                    "rate, clip gradients, or use a wider dtype"
                )


def check_fit(given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise `DataError` unless both have the same names and shapes; the message lists what differs.

    Arguments:
        given: name -> shape of the tensors to load.
        wanted: name -> shape in the model.
        what: what the message calls the tensors.
    """
    missing = [f"{name!r} {wanted[name]} is missing" for name in wanted if name not in given]
    extra = [f"{name!r} {given[name]} is not in the model" for name in given if name not in wanted]
    shapes = [
        f"{name!r} is {given[name]}, the model's is {wanted[name]}"
        for name in wanted
        if name in given and given[name] != wanted[name]
    ]
    if differences := missing + extra + shapes:
        shown = "; ".join(differences[:5]) + ("; …" if len(differences) > 5 else "")
        raise DataError(f"{what} does not fit the model ({len(differences)} differences): {shown}")
