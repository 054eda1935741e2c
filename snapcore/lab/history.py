"""The loss of every update, kept as a table beside the members."""

import csv
import math
import os
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path

from snapcore.errors import StoreError
from snapcore.lab.files import open_regular
from snapcore.lab.ours import COLUMNS, HISTORY
from snapcore.store import atomic_write

Row = tuple[int, float, float]

_ROUNDING = 1e-9  # of a rate, between one machine's cosine and another's
_LONGEST = 100  # characters of a line; a row has at most 70


class History:
    """Collect losses as a run reports them; `write` brings `history.csv` up to date.

    A run that is resumed reads the table first. Updates that are done again, because they came after the resume
    point, replace the rows they had.

    Arguments:
        directory: of the run.
        rate: the schedule, step -> rate.
        resumed: whether a table there is of this run.
        check: called before every write; if it raises, nothing is written.

    Raises:
        StoreError: the table there is damaged, or of another run.
    """

    def __init__(
        self,
        directory: Path,
        rate: Callable[[int], float],
        *,
        resumed: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = directory / HISTORY
        self._rate, self._check = rate, check
        self.rows = _read(self._path, rate) if resumed and os.path.lexists(self._path) else []
        self._written: int | None = None

    def report(self, step: int, loss: float) -> None:
        """Note the loss of update `step`, counted from 1."""
        if self.rows and self.rows[-1][0] >= step:
            self.rows = [row for row in self.rows if row[0] < step]
        self.rows.append((step, self._rate(step - 1), loss))

    def write(self, *, anew: bool = False) -> None:
        """Bring the file up to date: the first time, or `anew`, all of it; else by what is new.

        Raises:
            StoreError: it cannot be written, or `check` has refused.
        """
        self._check()
        try:
            if anew or self._written is None:
                with atomic_write(self._path) as temporary:
                    _append(temporary, [COLUMNS, *self.rows])
            else:
                _append(self._path, self.rows[self._written :])
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error}; make room, then start again") from error
        self._written = len(self.rows)


def _append(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows)
        file.flush()
        os.fsync(file.fileno())  # a resume point follows, after which no row is made again


def _read(path: Path, rate: Callable[[int], float]) -> list[Row]:
    rows: list[Row] = []
    try:
        with TextIOWrapper(open_regular(path), "utf-8", newline="") as file:
            if tuple(file.readline(_LONGEST).rstrip("\r\n").split(",")) != COLUMNS:
                raise ValueError(f"it does not begin with {','.join(COLUMNS)}")
            while (line := file.readline(_LONGEST)).endswith("\n"):
                step, lr, loss = line.split(",")
                row = (int(step), float(lr), float(loss))
                follows = not rows or row[0] == rows[-1][0] + 1
                if not (
                    follows and math.isclose(row[1], rate(row[0] - 1), rel_tol=_ROUNDING) and math.isfinite(row[2])
                ):
                    raise ValueError(f"{row} is no update of this run")
                rows.append(row)
            if len(line) == _LONGEST:  # a kill may have cut the last line off, and made none longer
                raise ValueError(f"a line has more than {_LONGEST} characters")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; move it away") from error
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged: {error}; delete it, and the run resumes without its first rows"
        ) from error
    return rows
