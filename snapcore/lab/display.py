"""What a person sees during a run, and after it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from snapcore.protocol import Program, Snapshot

_REFRESH = 0.1  # seconds


class Display:
    """Print to a console: plain lines for what is to be kept, a bar for what passes."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Print one line as it is."""
        self.console.print(text, markup=False, emoji=False)

    def member(self, snapshot: Snapshot, scores: Mapping[str, float]) -> None:
        """Print a member as it is taken."""
        self.line(
            f"member {snapshot.index}   update {snapshot.step:>6}   lr {snapshot.lr:.2e}   "
            f"error {scores['error']:5.2f} %   NLL {scores['nll']:.4f}"
        )

    @contextmanager
    def progress(self, program: Program) -> Iterator[Callable[[int, float], None]]:
        """Show a bar with the cycle, the rate, the loss and the time left; yields what to report to."""
        columns = (
            TextColumn("cycle {task.fields[cycle]}/{task.fields[cycles]}"),
            BarColumn(),
            TextColumn(
                "{task.completed}/{task.total} updates   lr {task.fields[lr]:.4f}   loss {task.fields[loss]:.4f}"
            ),
            TimeRemainingColumn(),
        )
        schedule = program.schedule
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as bar:
            task = bar.add_task(
                "", total=program.updates, cycle=1, cycles=len(schedule.cycle_starts), lr=schedule(0), loss=float("nan")
            )
            shown = 0.0

            def report(step: int, loss: float) -> None:
                nonlocal shown
                if time.monotonic() - shown > _REFRESH or step == program.updates:
                    shown = time.monotonic()
                    cycle = schedule.cycle_at(step - 1) + 1
                    bar.update(task, completed=step, cycle=cycle, lr=schedule(step - 1), loss=loss)

            yield report

    def ensembles(self, curve: Sequence[Mapping[str, Any]]) -> None:
        """Print the table of ensembles: the last m members, m = 1 … M."""
        table = Table("m", "error", "NLL", "Brier", "ECE", title="ensembles of the last m members", box=None)
        for column in table.columns:
            column.justify = "right"
        for row in curve:
            cells = (f"{row['error']:.2f} %", *(f"{row[name]:.4f}" for name in ("nll", "brier", "ece")))
            table.add_row(str(row["m"]), *cells)
        self.console.print(table)
