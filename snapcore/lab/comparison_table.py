"""What a person sees of a comparison: a table that grows while cells are trained, and the pairs in words."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from snapcore.lab.cells import Cell
from snapcore.lab.comparison import TITLES, summary
from snapcore.lab.scores import cell as shown
from snapcore.lab.text import counted


@contextmanager
def live_table(console: Console) -> Iterator[Callable[[Mapping[Cell, Mapping[str, Any]], int], None]]:
    """Show a table of what is known so far, and the time left; yields what `compare` takes as `watch`."""
    began, before = time.perf_counter(), [-1]
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def watch(done: Mapping[Cell, Mapping[str, Any]], left: int) -> None:
            if before[0] < 0:
                before[0] = len(done)  # these took no time
            trained = len(done) - before[0]
            each = (time.perf_counter() - began) / trained if trained else None
            ahead = "" if each is None or not left else f", about {each * left / 60:.0f} min"
            title = f"{counted(len(done), 'cell')} done, {left} left{ahead}"
            if console.is_terminal and done:
                rows = summary(done, {})["methods"]
                live.update(table_of(rows, title), refresh=True)

        yield watch


def table_of(methods: Mapping[str, Mapping[str, list[Any]]], title: str) -> Table:
    """Return a table of methods: their cost, members and mean scores over the seeds that have them."""
    scores = [name for name in next(iter(methods.values())) if name not in ("updates", "members")]
    table = Table(
        "method", "seeds", "updates", "members", *(TITLES.get(name, name) for name in scores), title=title, box=None
    )
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for method, rows in methods.items():
        done = [index for index, value in enumerate(rows["updates"]) if value is not None]
        cells = [
            "–"
            if not (values := [value for value in rows[name] if value is not None])
            else shown(name, sum(values) / len(values))
            for name in scores
        ]
        first = done[0] if done else None
        cost = ["–", "–"] if first is None else [f"{rows['updates'][first]:,}", str(rows["members"][first])]
        table.add_row(method, str(len(done)), *cost, *cells)
    return table


def describe(comparison: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on the pairs that decide, on equivalents and on what failed; the verdict last."""
    deciding = str(comparison["pairs"][0]["score"]) if comparison["pairs"] else ""
    for pair in comparison["pairs"]:
        if pair["score"] == deciding and pair["difference"] is not None:
            yield (
                f"{pair['a']} − {pair['b']}: {TITLES.get(deciding, deciding)} {pair['difference']:+.4f}, 95 % interval "
                f"{pair['low']:+.4f} to {pair['high']:+.4f}, p = {pair['p']:.3f}, {pair['pairs']} seeds"
            )
    for method, worth in comparison["equivalent"].items():
        said = ", ".join(
            f"{'more than were trained' if value is None else f'{value:.2f}'} by {TITLES.get(score, score)}"
            for score, value in worth.items()
        )
        yield f"{method} is worth this many independent networks: {said}"
    for name, message in comparison["failed"].items():
        yield f"{name} failed: {message}"
    yield str(comparison["verdict"])
