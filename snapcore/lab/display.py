"""What a person sees during a run, and after it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from snapcore.lab.scores import SHOWN, cell, in_line
from snapcore.lab.text import printable
from snapcore.protocol import Program, Snapshot


class Display:
    """Print to a console: plain lines for what is to be kept, a bar for what passes."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Print one line, whatever is in it."""
        self.console.print(printable(text), markup=False, emoji=False)

    def member(self, snapshot: Snapshot, scores: Mapping[str, float]) -> None:
        """Print a member as it is taken."""
        self.line(
            f"member {snapshot.index}   update {snapshot.step:>6}   lr {snapshot.lr:.2e}   "
            f"{'   '.join(in_line(scores))}"
        )

    @contextmanager
    def progress(self, program: Program) -> Iterator[Callable[[int, float], None]]:
        """Show a bar with the cycle, the rate, the loss and the time left; yields what to report to."""
        with _Bar(program, self.console) as bar:
            yield bar.report

    def results(self, results: Mapping[str, Any]) -> None:
        """Print what came of a run: its ensembles, and what else is known of them."""
        self.ensembles(results["ensemble"])
        if "spread_correlation" in results:
            self.spread(results["spread_correlation"])

    def ensembles(self, curve: Sequence[Mapping[str, Any]]) -> None:
        """Print the table of ensembles: the last m members, m = 1 … M, with the scores that the task has."""
        names = [name for name in SHOWN if name in curve[0]]
        columns = ["m", *(SHOWN[name] for name in names)]
        calibrated = any("temperature" in row for row in curve)
        if calibrated:
            columns += ["T", "NLL at T"]
        table = Table(*columns, title="ensembles of the last m members", box=None)
        for column in table.columns:
            column.justify = "right"
        for row in curve:
            cells = [cell(name, row[name]) for name in names]
            if calibrated:
                fitted = "temperature" in row
                cells += (f"{row['temperature']:.3f}", f"{row['calibrated_nll']:.4f}") if fitted else ("–", "–")
            table.add_row(str(row["m"]), *cells)
        self.console.print(table)

    def spread(self, correlations: Mapping[str, float | None]) -> None:
        """Print how the uncertainty ranks the examples beside the spread between people."""
        found = ", ".join(f"{name} {'–' if value is None else f'{value:.3f}'}" for name, value in correlations.items())
        self.line(f"rank correlation of the uncertainty with the spread between people: {found}")


class _Bar(Progress):
    """A bar that is drawn from the newest report, ten times a second.

    Reports come in bulk, up to hundreds within a millisecond and then none for a while: what is shown must be the
    last of them, which no clock that is read in `report` can know.
    """

    def __init__(self, program: Program, console: Console) -> None:
        self._schedule = program.schedule
        self._newest: tuple[int, float] | None = None
        columns = (
            TextColumn("cycle {task.fields[cycle]}/{task.fields[cycles]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} updates   lr {task.fields[lr]:.4f}{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, disable=not console.is_terminal, transient=True)
        schedule = program.schedule
        self._task = self.add_task(
            "", total=program.updates, cycle=1, cycles=len(schedule.cycle_starts), lr=schedule(0), loss=""
        )

    def report(self, step: int, loss: float) -> None:
        """Note that update `step`, counted from 1, is done."""
        self._newest = (step, loss)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return what is drawn now."""
        if self._newest is not None:
            step, loss = self._newest
            cycle, lr = self._schedule.cycle_at(step - 1) + 1, self._schedule(step - 1)
            self.update(self._task, completed=step, cycle=cycle, lr=lr, loss=f"   loss {loss:.4f}")
        return super().get_renderables()
