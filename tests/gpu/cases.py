"""What a part of `make gpu` is made of: tests that pass or fail, and comparisons whose ratios are kept."""

import gc
import math
import statistics
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from compare import Contender, Ratios, interleaved

T = TypeVar("T")
Size = Literal["full", "small", "tiny"]
"""`full` is for a GPU, `small` for a CPU, `tiny` for the test that runs the command itself."""
Kind = Literal["test", "comparison"]


class NotRun(Exception):  # noqa: N818  it is no error
    """Raised by a case that cannot be run on this machine; its text says why."""


@dataclass
class Setting:
    """What a case is run with, and what it leaves behind.

    Arguments:
        folder: its own, empty.
        size: how much to do.
        end: when no other turn of a comparison is to begin, as `time.monotonic` counts.
    """

    folder: Path
    size: Size
    end: float
    found: dict[str, Any] = field(default_factory=dict)
    """Numbers to keep."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One for each ratio."""

    def pick(self, *, full: T, small: T, tiny: T) -> T:
        """Return what belongs to the size."""
        return {"full": full, "small": small, "tiny": tiny}[self.size]

    def compare(self, ours: Mapping[str, Contender], beside: Mapping[str, Contender]) -> None:
        """Time all in turns, until the time for it is used, and keep the ratio of each of ours to each peer."""
        names = [*ours, *beside]
        first, *others = (*ours.values(), *beside.values())
        pairs = self.pick(full=41, small=15, tiny=2)
        gc.collect()
        gc.disable()  # one collection, of a process that has a framework in it, lasts longer than many an update
        try:
            seconds = self.end - time.monotonic()
            times = interleaved(first, dict(zip(names[1:], others, strict=True)), pairs=pairs, seconds=seconds)
        finally:
            gc.enable()
        samples = {names[0]: times.ours, **times.peers}
        self.rows += [_row(our, peer, samples) for our in ours for peer in beside]


Run = Callable[[Setting], None]


def _row(our: str, peer: str, samples: Mapping[str, Any]) -> dict[str, Any]:
    ratio, low, high = Ratios(samples[our], {peer: samples[peer]}).of(peer)
    return {
        "ours": our,
        "seconds": statistics.median(samples[our]),
        "peer": peer,
        "peer_seconds": statistics.median(samples[peer]),
        "ratio": ratio,
        "low": low if math.isfinite(low) else None,
        "high": high if math.isfinite(high) else None,
        "pairs": len(samples[our]),
    }


def lasting(run: Callable[[], object], *, seconds: float = 0.01) -> Contender:
    """Return what calls `run` so often that a sample lasts some time; `run` is called first to warm up."""
    run()
    once = timeit.timeit(run, number=1)
    return Contender(run, number=max(1, math.ceil(seconds / once)))


@dataclass(frozen=True)
class Case:
    """One test or one comparison.

    Arguments:
        name: a sentence about what holds, or what is compared.
        run: raises if it does not hold.
        kind: a test decides how the command ends, a comparison does not.
        needs_gpu: it says nothing on a CPU.
        share: of the part's time, beside the others'.
    """

    name: str
    run: Run
    kind: Kind
    needs_gpu: bool = False
    share: float = 1.0


class Suite:
    """The cases of one part, in the order they are run in.

    Arguments:
        about: the framework's version, the device, and under `"gpu"` whether that is one.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        self.about, self.cases = about, list[Case]()

    def test(self, name: str, *, needs_gpu: bool = False, share: float = 1.0) -> Callable[[Run], Run]:
        """Add a test."""
        return self._adding(name, kind="test", needs_gpu=needs_gpu, share=share)

    def comparison(self, name: str, *, share: float = 1.0) -> Callable[[Run], Run]:
        """Add a comparison."""
        return self._adding(name, kind="comparison", share=share)

    def _adding(self, name: str, **options: Any) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            self.cases.append(Case(name, run, **options))
            return run

        return add


def check(holds: bool, message: str) -> None:
    """Raise `AssertionError` with the message unless it holds: pytest, which would write one, is not here."""
    if not holds:
        raise AssertionError(message)


def check_equal_bits(found: Mapping[str, bytes], wanted: Mapping[str, bytes], what: str) -> None:
    """Raise `AssertionError` unless two states have the same names and bytes; the message says which differ."""
    check(found.keys() == wanted.keys(), f"{what}: names are {sorted(found)}, wanted {sorted(wanted)}")
    other = [name for name in wanted if found[name] != wanted[name]]
    check(not other, f"{what}: {len(other)} of {len(wanted)} tensors have other bits, such as {other[:3]}")
