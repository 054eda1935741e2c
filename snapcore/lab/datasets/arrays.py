"""What a reader finds: two sets of examples and their labels, as they lie on disk; and what readers share."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from snapcore.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from numpy.typing import NDArray

_SMALL = 2**24  # bytes that may be unpacked from however few
_DENSEST = 200  # times that images may be packed: binary ones reach some 100, nothing but zeros 230 to 1000


class Arrays(NamedTuple):
    """Examples and labels before they are checked.

    Attributes:
        x_train: images, [n, height, width] or [n, height, width, channels]; or vectors, floats [n, features].
        y_train: class numbers, [n] or one for each pixel; labels, [n, labels]; or values, [n] or [n, values].
        x_test: as `x_train`.
        y_test: as `y_train`.
        loss: what the data set is for, where its reader knows; None where the labels' type says it.
        ignore: the class number of pixels that do not count.
        spread: how far apart people are on each example of the test part, [n].
        alike: whether all features have one unit, as pixels do; otherwise each is standardised by itself.
    """

    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    loss: str | None = None
    ignore: int | None = None
    spread: NDArray[np.float64] | None = None
    alike: bool = False


def refuse_bomb(path: Path, size: int, packed: int) -> None:
    """Raise `DataError` if what claims to unpack to `size` bytes from `packed` cannot be images or labels."""
    if size > max(_SMALL, _DENSEST * packed):
        raise DataError(
            f"{path} must unpack to {_DENSEST} times its size at most, claims {size} bytes in {packed}: fetch it again"
        )


def seeded_raw(n: int) -> NDArray[np.uint64]:
    """Return n numbers, the same for ever: NumPy promises the raw stream, but not what `permutation` makes of it."""
    return np.asarray(np.random.PCG64(2017).random_raw(n), np.uint64)


def seeded_order(n: int) -> NDArray[np.intp]:
    """Return a permutation of n, the same for ever."""
    return np.argsort(seeded_raw(n), kind="stable")


def scikit_learn(module: str, what: str) -> ModuleType:
    """Return a module of scikit-learn, which `what` needs.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise DataError(f"{what} needs scikit-learn: pip install 'snapcore[lab]'") from error
