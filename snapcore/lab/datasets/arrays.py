"""What a reader finds: two sets of images and their labels, as they lie on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from snapcore.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_SMALL = 2**24  # bytes that may be unpacked from however few
_DENSEST = 200  # times that images may be packed: binary ones reach some 100, nothing but zeros 230 to 1000


class Arrays(NamedTuple):
    """Images and labels before they are checked."""

    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]


def refuse_bomb(path: Path, size: int, packed: int) -> None:
    """Raise `DataError` if what claims to unpack to `size` bytes from `packed` cannot be images or labels."""
    if size > max(_SMALL, _DENSEST * packed):
        raise DataError(
            f"{path} must unpack to {_DENSEST} times its size at most, claims {size} bytes in {packed}: fetch it again"
        )
