"""Which way of running an ensemble is the fastest here: measured in turns, and checked against the plain one."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from snapcore.errors import DataError, SnapcoreError

Result = TypeVar("Result")

TOLERANCE = 1e-6
ROUNDS = 7


@dataclass(frozen=True)
class Trial:
    """What was found about one strategy.

    Arguments:
        seconds: the median of one call; None if it was not measured.
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
        return "\n".join(self._line(name, trial) for name, trial in self.items())

    def _line(self, name: str, trial: Trial) -> str:
        if trial.seconds is None:
            return f"{name}: refused, {trial.refused}"
        kept = "  <- kept" if name == self.chosen else ""
        return f"{name}: {trial.seconds * 1e3:.3g} ms, deviation {trial.deviation:.1g}{kept}"


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

    The first call of each compiles and is compared, not timed. After that they take turns, each round beginning with
    another, so that what slows the machine down for a while slows all of them down.

    Arguments:
        run: does one call of the strategy named, waits for it, and returns its result; a `SnapcoreError` says that it
            cannot.
        strategies: names; the first is the one that the others are compared with.
        to_host: brings a result to the host.
        tolerance: the largest deviation, max |p − q| / max |q|, with which a strategy may be chosen.
        rounds: timed calls of each, 1 or more.
        clock: tells the time in seconds.

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
    trials |= {name: _trial(run, name, to_host, reference, tolerance) for name in others}
    times = _times(run, [name for name in strategies if trials[name].refused is None], rounds, clock)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    measured = {name: Trial(seconds, trials[name].deviation) for name, seconds in medians.items()}
    return TuningReport(min(medians, key=medians.__getitem__), {**trials, **measured})


def deviation(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return max |found − wanted| / max |wanted|: infinity for other shapes, NaN if a value is NaN."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.size:
        return 0.0
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
    return float(difference / (np.abs(wanted.astype(np.float64)).max() or 1.0))


def _trial(
    run: Callable[[str], Result],
    name: str,
    to_host: Callable[[Result], NDArray[Any]],
    reference: NDArray[Any],
    tolerance: float,
) -> Trial:
    try:
        found = deviation(to_host(run(name)), reference)
    except SnapcoreError as error:
        return Trial(refused=str(error))
    if found <= tolerance:
        return Trial(deviation=found)
    return Trial(deviation=found, refused=f"it deviates by {found:.2g}, more than {tolerance:.2g}")


def _times(
    run: Callable[[str], object], names: Sequence[str], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in names}
    for each in range(rounds):
        begin = each % len(names)
        for name in [*names[begin:], *names[:begin]]:
            began = clock()
            run(name)
            times[name].append(clock() - began)
    return times
