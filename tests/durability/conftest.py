"""What the durability tests share: the process that starts commands, the undisturbed runs, and the table at the end."""

import collections
import functools
import os
import platform
import time
from importlib.metadata import version
from typing import NamedTuple

import pytest

from .harness import SLOW, Zygote, finished

AT_RANDOM = "1. killed at a random instant"
AT_POINT = "2. killed at a named point"
REFUSED = "3. refused by the disk, then started again"
DAMAGED = "4. damaged at random"
MOVED = "5. moved or deleted at a random instant, and another run started at its name"
INTERRUPTED = "6. Ctrl-C at a random instant"
SLOW_DISK = "7. ended on a disk that takes half a second for a flush"


class Reference(NamedTuple):
    directory: object
    seconds: float


@pytest.fixture(scope="session")
def zygote():
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="session")
def reference(zygote, tmp_path_factory):
    """The undisturbed run of a method, made once, and how long it took slowly."""

    @functools.cache
    def run(method="snapshot"):
        directory = tmp_path_factory.mktemp("reference") / "run"
        (directory.parent / SLOW).touch()
        began = time.monotonic()
        finished(zygote.start(directory, method))
        return Reference(directory, time.monotonic() - began)

    return run


@pytest.fixture
def note(record_property):
    """Count something for a table: `note(table, row, column=count)`."""

    def add(table, row, **counts):
        record_property("durability", [table, row, counts])

    return add


def pytest_terminal_summary(terminalreporter):
    """Print the tables that docs/durability.md keeps, if a number of kills was asked for."""
    if "SNAPCORE_KILLS" not in os.environ:
        return
    tables = collections.defaultdict(lambda: collections.defaultdict(collections.Counter))
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for _, (table, row, counts) in (own for own in report.user_properties if own[0] == "durability"):
                tables[table][row].update({**counts, "failed": sum(counts.values()) if report.failed else 0})
    for title in sorted(tables):
        terminalreporter.section(title)
        for line in table_lines(tables[title]):
            terminalreporter.write_line(line)
    machine = f"{platform.system()} {platform.release()} on {platform.machine()}, {os.cpu_count()} cores"
    terminalreporter.write_line(f"{machine}, Python {platform.python_version()}, torch {version('torch')}")


def table_lines(rows):
    columns = list(dict.fromkeys(column for counts in rows.values() for column in counts if column != "failed"))
    lines = [["", *columns, "failed"]]
    lines += [[row, *(str(counts.get(column, "")) for column in lines[0][1:])] for row, counts in sorted(rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])
