"""RAND's health insurance experiment, as statsmodels ships it: 20,190 rows, nine features, visits to a doctor."""

import importlib.util
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from snapcore.errors import DataError
from snapcore.lab.datasets.arrays import Arrays, seeded_order
from snapcore.lab.files import open_regular

COLUMNS = ("mdvis", "lncoins", "idp", "lpi", "fmde", "physlm", "disea", "hlthg", "hlthf", "hlthp")
"""The target, and the features."""

_FILE = "randhie.csv"
_LARGEST = 2**24  # bytes; statsmodels' file has 748,181


def read_randhie(directory: str | os.PathLike[str] | None) -> Arrays:
    """Return four fifths of the rows to train on and one fifth to test on; the split never changes.

    The target is ln(1 + visits), standardised by these four fifths. Rows of one person, which the file does not number,
    may be in both parts.

    Arguments:
        directory: the file, or a folder that has it; by default statsmodels' own, of which nothing is imported.

    Raises:
        DataError: there is no such file, or it is another.
    """
    path = _installed() if directory is None else Path(directory)
    rows = _read(path / _FILE if path.is_dir() else path)
    visits, features = np.log1p(rows[:, 0]), rows[:, 1:]
    order = seeded_order(len(rows))
    test, train = np.split(order, [len(rows) // 5])
    mean, std = visits[train].mean(), visits[train].std()
    if not std > 0:
        raise DataError(f"{path}: {COLUMNS[0]} must differ between rows, got {rows[0, 0]:g} in all: fetch it again")
    target = (visits - mean) / std
    return Arrays(features[train], target[train], features[test], target[test], loss="squared-error")


def _installed() -> Path:
    """Return the folder in statsmodels, which is large and slow to import, and only looked for."""
    found = importlib.util.find_spec("statsmodels")
    if found is None or not found.submodule_search_locations:
        raise DataError(f"randhie needs statsmodels: pip install statsmodels, or give its {_FILE} as --data-dir")
    return Path(next(iter(found.submodule_search_locations))) / "datasets" / "randhie"


def _read(path: Path) -> NDArray[np.float64]:
    try:
        with open_regular(path) as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        header, *lines = text.decode("ascii").splitlines()
        if header != ",".join(COLUMNS):
            raise ValueError(f"it does not begin with {','.join(COLUMNS)}")
        rows = np.array([[float(cell) for cell in line.split(",")] for line in lines])
        if rows.ndim != 2 or rows.shape[1] != len(COLUMNS) or len(rows) < 10:
            raise ValueError(f"it must have 10 rows or more of {len(COLUMNS)} numbers, got {list(rows.shape)}")
        if not np.isfinite(rows).all() or rows[:, 0].min() < 0:
            raise ValueError(f"numbers must be finite, and {COLUMNS[0]} not negative")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be statsmodels' {_FILE}: {error}: fetch it again") from error
    return rows
