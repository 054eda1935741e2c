"""The loss of every update, kept as a table beside the members."""

import csv
from collections.abc import Callable
from pathlib import Path

FILE = "history.csv"
_HEADER = ("step", "lr", "loss")


class History:
    """Collect losses as a run reports them; `write` adds what is new to `history.csv`.

    Arguments:
        directory: of the run; it exists by the time of the first `write`.
        rate: the schedule, step -> rate.
    """

    def __init__(self, directory: Path, rate: Callable[[int], float]) -> None:
        self._path = directory / FILE
        self._rate = rate
        self.rows: list[tuple[int, float, float]] = []
        self._written = 0

    def report(self, step: int, loss: float) -> None:
        """Note the loss of update `step`, counted from 1."""
        self.rows.append((step, self._rate(step - 1), loss))

    def write(self) -> None:
        """Bring the file up to date."""
        new = self._written == 0
        with self._path.open("w" if new else "a", newline="") as file:
            table = csv.writer(file)
            table.writerows([_HEADER] * new)
            table.writerows(self.rows[self._written :])
        self._written = len(self.rows)
