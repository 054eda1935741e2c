"""The loss of every update, kept as a table beside the members."""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from snapcore.errors import StoreError
from snapcore.store import atomic_write

FILE = "history.csv"
_HEADER = ("step", "lr", "loss")


class History:
    """Collect losses as a run reports them; `write` brings `history.csv` up to date.

    A run that is resumed reads the table first. Updates that are done again, because they came after the resume
    point, replace the rows they had.

    Arguments:
        directory: of the run.
        rate: the schedule, step -> rate.
    """

    def __init__(self, directory: Path, rate: Callable[[int], float]) -> None:
        self._path = directory / FILE
        self._rate = rate
        self.rows = _read(self._path)
        self._written: int | None = None

    def report(self, step: int, loss: float) -> None:
        """Note the loss of update `step`, counted from 1."""
        if self.rows and self.rows[-1][0] >= step:
            self.rows = [row for row in self.rows if row[0] < step]
        self.rows.append((step, self._rate(step - 1), loss))

    def write(self) -> None:
        """Bring the file up to date: the first time all of it, from then on by what is new.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            if self._written is None:
                with atomic_write(self._path) as temporary:
                    _append(temporary, [_HEADER, *self.rows])
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


def _read(path: Path) -> list[tuple[int, float, float]]:
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            lines = [line for line in file if line.endswith("\n")]  # a kill may have cut the last one off
        return [(int(step), float(lr), float(loss)) for step, lr, loss in csv.reader(lines[1:])]
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged: {error}; delete it, and the run resumes without its first rows"
        ) from error
