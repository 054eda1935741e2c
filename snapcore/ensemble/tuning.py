"""Which way of running an ensemble is the fastest here: measured in turns, and checked against the plain one."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from snapcore.errors import DataError, SnapcoreError

Result = TypeVar("Result")

TOLERANCE = 1e-6
ROUNDS = 31

_SAMPLE = 0.01
"""What a sample lasts at least, in seconds: a first call finds another strategy's data in the caches, and is slow."""
_LEAST = 5
"""Rounds that all take part in, whatever they last."""
_NEAR = 1.5
"""Times the fastest: whose best sample is slower is passed over, since slow moments do not explain that."""
_LONGEST = 2.0
"""After how many seconds no round begins any more."""


@dataclass(frozen=True)
class Trial:
    """What was found about one strategy.

    Arguments:
        seconds: what a call takes, the lower quartile of the samples; None if it was not measured.
        deviation: max |p − q| / max |q|, q being the first strategy's result; None if there was nothing to compare.
        refused: why it cannot be chosen, or None.
    """

    seconds: float | None = None
    deviation: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class TuningReport(Mapping[str, Trial]):
    """What was found, by strategy; printed, it is a table.

    Arguments:
        chosen: the fastest that agrees with the first.
        trials: strategy -> what was found about it.
    """

    chosen: str
    trials: Mapping[str, Trial]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the trials as plain JSON."""
        return {name: asdict(trial) for name, trial in self.items()}

    def __getitem__(self, strategy: str) -> Trial:
        return self.trials[strategy]

    def __iter__(self) -> Iterator[str]:
        return iter(self.trials)

    def __len__(self) -> int:
        return len(self.trials)

    def __str__(self) -> str:
        lines = []
        for name, trial in self.items():
            if trial.seconds is None:
                lines.append(f"{name}: refused, {trial.refused}")
            else:
                kept = "  <- kept" if name == self.chosen else ""
                lines.append(f"{name}: {trial.seconds * 1e3:.3g} ms, deviation {trial.deviation:.1g}{kept}")
        return "\n".join(lines)


def check_strategy(strategy: str, names: Iterable[str]) -> None:
    """Check that a strategy is one of the adapter's.

    Raises:
        DataError: it is not.
    """
    if strategy not in names:
        raise DataError(f"strategy must be one of {list(names)}, got {strategy!r}")


def tune(
    run: Callable[[str], Result],
    strategies: Sequence[str],
    *,
    to_host: Callable[[Result], NDArray[Any]],
    tolerance: float = TOLERANCE,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> TuningReport:
    """Measure strategies that should give the same, and choose the fastest that does.

    The first call of each compiles and is compared, not timed. After that they take turns, every second round in the
    opposite order, so that what slows the machine down for a while slows all of them down. A sample is the mean of as
    many calls in a row as fill 10 ms, and what counts is the lower quartile of the samples: what else the machine does
    only adds time, and a single lucky sample should not decide. After 5 rounds those whose best sample is above 1.5
    times the fastest median are passed over, and after 2 s no round begins any more.

    Arguments:
        run: does one call of the strategy named, waits for it, and returns its result; a `SnapcoreError` says that it
            cannot.
        strategies: names; the first is the one that the others are compared with.
        to_host: brings a result to the host.
        tolerance: the largest deviation, max |p − q| / max |q|, with which a strategy may be chosen.
        rounds: the most samples of each, 1 or more; fewer are taken of slow strategies, and where calls are long.
        clock: returns the time in seconds, which must pass.

    Raises:
        DataError: `rounds` is below 1.
        SnapcoreError: the first strategy cannot be run.

    Example:
        >>> doubled = {"sum": lambda x: x + x, "product": lambda x: 2 * x}
        >>> report = tune(lambda name: doubled[name](np.ones(3)), list(doubled), to_host=np.asarray)
        >>> report["product"].deviation
        0.0
    """
    if rounds < 1:
        raise DataError(f"rounds must be at least 1, got {rounds}")
    first, *others = strategies
    reference = to_host(run(first))
    trials = {first: Trial(deviation=0.0)}
    for name in others:
        try:
            found = deviation(to_host(run(name)), reference)
        except SnapcoreError as error:
            trials[name] = Trial(refused=str(error))
            continue
        refused = None if found <= tolerance else f"it deviates by {found:.2g}, more than {tolerance:.2g}"
        trials[name] = Trial(deviation=found, refused=refused)
    times = _times(run, [name for name in strategies if trials[name].refused is None], rounds, clock)
    quartiles = {name: _quartile(seconds) for name, seconds in times.items()}
    measured = {name: Trial(seconds, trials[name].deviation) for name, seconds in quartiles.items()}
    return TuningReport(min(quartiles, key=quartiles.__getitem__), {**trials, **measured})


def deviation(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return max |found − wanted| / max |wanted|: infinity for other shapes, NaN if a value is NaN."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.size:
        return 0.0
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
    return float(difference / (np.abs(wanted.astype(np.float64)).max() or 1.0))


def _times(
    run: Callable[[str], object], names: Sequence[str], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in names}
    end = clock() + _LONGEST
    for done in range(rounds):
        if done >= _LEAST and clock() >= end:
            break
        near = list(names)
        if done >= _LEAST:
            # Not the quartile: as a burst of noise ends, one may have two samples without it, and another none.
            fastest = min(map(median, times.values()))
            near = [name for name in names if min(times[name]) <= _NEAR * fastest]
        for name in reversed(near) if done % 2 else near:
            times[name].append(_sample(run, name, clock))
    return times


def _quartile(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 4]


def _sample(run: Callable[[str], object], name: str, clock: Callable[[], float]) -> float:
    began, passed, calls = clock(), 0.0, 0
    while passed < _SAMPLE:
        run(name)
        passed, calls = clock() - began, calls + 1
    return passed / calls
