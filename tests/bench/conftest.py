"""What the benchmarks share: two threads, the comparison that each of them makes, and the table at the end."""

import os
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .compare import PAIRS, SECONDS, Contender, Ratios, Row, format_table, interleaved, rows

Compare = Callable[..., Ratios]
_TABLE = pytest.StashKey[list[Row]]()
_OWN_ROUNDS = 3


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[Row]:
    """The lines that are printed when the session ends."""
    return request.config.stash.setdefault(_TABLE, [])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("SNAPCORE_BENCH_THREADS", "2")))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compare(benchmark: BenchmarkFixture, threads: None, table: list[Row]) -> Compare:
    """Compare in turns, then let pytest-benchmark time our side and keep the ratios."""

    def run(
        name: str, ours: Contender, peers: Mapping[str, Contender], *, target: str = "–", pairs: int = PAIRS
    ) -> Ratios:
        ratios = interleaved(ours, peers, pairs=pairs, seconds=SECONDS)
        benchmark.pedantic(ours.run, setup=ours.prepare, rounds=_OWN_ROUNDS, iterations=ours.number)
        benchmark.extra_info.update(target=target, pairs=len(ratios.ours), units=ours.units)
        benchmark.extra_info["ratios"] = {peer: ratios.of(peer)._asdict() for peer in peers}
        table.extend(rows(name, ratios, target))
        return ratios

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_TABLE, [])
    if lines:
        terminalreporter.section("comparisons: ratio = ours / peer, median of pairs [95 % interval]")
        for line in format_table(lines):
            terminalreporter.write_line(line)
