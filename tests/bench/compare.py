"""How two pieces of code are compared: in one process, in turns, as ratios of neighbours.

Times of one run differ from the next far more than ratios of neighbours do: the clock rate, the caches and whatever
else the machine does change slowly. So the contenders take turns, each pair gives one ratio, and what is reported
is the median of the ratios with an interval that assumes nothing about their distribution.
"""

import math
import os
import random
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PAIRS = int(os.environ.get("SNAPCORE_BENCH_PAIRS", "21"))
SECONDS = float(os.environ.get("SNAPCORE_BENCH_SECONDS", "90"))
"""For one comparison: a busy machine makes fewer pairs, and so wider intervals, and ends all the same."""


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Arguments:
        run: called `number` times in a row for one sample; what it returns is dropped within the time.
        prepare: called before every sample, outside of its time.
        number: calls in one sample, which should last a few milliseconds or more.
        units: what one call does, such as its updates; times are given per unit.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    number: int = 1
    units: int = 1

    def sample(self) -> float:
        """Return seconds per unit."""
        timer = timeit.Timer(self.run, self.prepare or "pass")
        return timer.timeit(self.number) / (self.number * self.units)


class Interval(NamedTuple):
    """A median, and the interval that holds the true one 95 times in 100."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratios:
    """The samples of one comparison, in seconds per unit; position k of each belongs to the k-th turn."""

    ours: Sequence[float]
    peers: Mapping[str, Sequence[float]]

    def of(self, peer: str) -> Interval:
        """Return ours / peer: below 1, ours is faster."""
        return median_interval([a / b for a, b in zip(self.ours, self.peers[peer], strict=True)])


def interleaved(
    ours: Contender, peers: Mapping[str, Contender], *, pairs: int = PAIRS, seconds: float = math.inf
) -> Ratios:
    """Time the contenders in turns, after one turn that does not count.

    Every second turn walks the order of the one before backwards (ABBA), so that a drift of the machine falls on
    all alike; the orders themselves are random, from a fixed seed.

    Arguments:
        ours: what each ratio has above its line.
        peers: what it has below, by name.
        pairs: turns, at most.
        seconds: no turn but the first begins later than this after the call.
    """
    end = time.monotonic() + seconds
    contenders = [ours, *peers.values()]
    times: list[list[float]] = [[] for _ in contenders]
    shuffle = random.Random(0).shuffle
    order = list(range(len(contenders)))
    for contender in contenders:
        contender.sample()
    for turn in range(pairs):
        if turn and time.monotonic() > end:
            break
        if turn % 2:
            order.reverse()
        else:
            shuffle(order)
        for index in order:
            times[index].append(contenders[index].sample())
    return Ratios(times[0], dict(zip(peers, times[1:], strict=True)))


def fastest(contenders: Mapping[str, Contender], *, pairs: int = PAIRS, seconds: float = math.inf) -> str:
    """Return the name of the one with the smallest median, timed in turns."""
    (first, ours), *others = contenders.items()
    ratios = interleaved(ours, dict(others), pairs=pairs, seconds=seconds)
    medians = {first: statistics.median(ratios.ours)} | {
        name: statistics.median(times) for name, times in ratios.peers.items()
    }
    return min(medians, key=medians.__getitem__)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the median with its interval by order statistics.

    The k-th smallest and the k-th largest of n values enclose the true median with probability
    1 − 2 · P(B < k), B ~ Binomial(n, 1/2), whatever the distribution; k is the largest that keeps the confidence.
    Fewer than 6 values keep 95 % with no k, and the interval is everything.
    """
    ordered, n = sorted(values), len(values)
    tails = [sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n // 2 + 1)]
    k = max(k for k, tail in enumerate(tails) if 2 * tail <= 1 - confidence)
    low, high = (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)
    return Interval(statistics.median(ordered), low, high)


class Row(NamedTuple):
    """A line of the table that ends a session."""

    comparison: str
    ours: str
    peer: str = "–"
    theirs: str = "–"
    ratio: str = "–"
    target: str = "–"


def rows(comparison: str, ratios: Ratios, target: str) -> list[Row]:
    """Describe a comparison, one line per peer; the target is about the first, the others stand beside it."""
    ours = median_interval(ratios.ours)
    if not ratios.peers:
        span = f"{seconds(ours.median)} [{seconds(ours.low)}, {seconds(ours.high)}]"
        return [Row(comparison, span, target=target)]
    targets = (target, *[Row._field_defaults["target"]] * (len(ratios.peers) - 1))
    return [
        Row(comparison, seconds(ours.median), peer, seconds(statistics.median(times)), _ratio(ratios.of(peer)), goal)
        for (peer, times), goal in zip(ratios.peers.items(), targets, strict=True)
    ]


def _ratio(interval: Interval) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def seconds(value: float) -> str:
    """Write a time with three digits and the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def format_table(lines: Sequence[Row]) -> list[str]:
    """Align the lines under the names of their columns."""
    table = [tuple(name.replace("_", " ") for name in Row._fields), *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
