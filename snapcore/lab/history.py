"""The loss of every update, kept as a table beside the members."""

import csv
from collections.abc import Callable
from pathlib import Path

from snapcore.errors import StoreError

FILE = "history.csv"
_HEADER = ("step", "lr", "loss")


class History:
    """Collect losses as a run reports them; `write` brings `history.csv` up to date.

    A run that goes on reads the table first. Updates that are done again, because they came after the resume point,
    take the place of the rows they had.

    Arguments:
        directory: of the run.
        rate: the schedule, step -> rate.
    """

    def __init__(self, directory: Path, rate: Callable[[int], float]) -> None:
        self._path = directory / FILE
        self._rate = rate
        self.rows = _read(self._path)
        self._written = len(self.rows)

    def report(self, step: int, loss: float) -> None:
        """Note the loss of update `step`, counted from 1."""
        if self.rows and self.rows[-1][0] >= step:
            self.rows = [row for row in self.rows if row[0] < step]
            self._written = 0
        self.rows.append((step, self._rate(step - 1), loss))

    def write(self) -> None:
        """Bring the file up to date.

        Raises:
            StoreError: it cannot be written.
        """
        new = self._written == 0
        try:
            with self._path.open("w" if new else "a", newline="") as file:
                table = csv.writer(file)
                table.writerows([_HEADER] * new)
                table.writerows(self.rows[self._written :])
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error}; make room, then start again") from error
        self._written = len(self.rows)


def _read(path: Path) -> list[tuple[int, float, float]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(int(row[0]), float(row[1]), float(row[2])) for row in rows if len(row) == len(_HEADER) and row[2]]
