"""Attack everything that is read from a run directory: `make fuzz`, which is `python -m tests.fuzz`.

Every case is a function of its number and the seed. What comes out of a reader must be an error of snapcore's or what
the files say, within a second and in little memory. A case that fails is printed with the command that repeats it.
"""

import argparse
import collections
import logging
import platform
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

from snapcore.errors import CycleWarning

from .attacks import ATTACKS
from .case import Hanging, Outcome, Runs

LONGEST = 1.0  # seconds that a reader may take
_HANGS = 10  # seconds after which it is ended
_MEMORY = 512 * 2**20  # bytes beside what the process has when it begins
_IN_MEMORY = "/dev/shm"  # where files cost no disk
_SHOWN = 5  # failures


def main() -> int:
    """Do the cases, print the table, and return how many failed, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="do this one alone")
    given = parser.parse_args()
    numbers = range(given.cases) if given.case is None else [given.case]
    began, rows, failures = time.perf_counter(), collections.defaultdict(Row), 0
    _limit()
    with tempfile.TemporaryDirectory(dir=_IN_MEMORY if Path(_IN_MEMORY).is_dir() else None) as folder:
        runs = Runs(Path(folder))
        for number in numbers:
            outcome = _unless_slow(runs, given.seed, number)
            attack = ATTACKS[number % len(ATTACKS)]
            rows[attack.name or "the directory", attack.how].count(outcome)
            if outcome.wrong:
                failures += 1
                if failures <= _SHOWN:
                    print(f"python -m tests.fuzz --seed {given.seed} --case {number}: {attack.name}, {attack.how}")
                    print(outcome.wrong)
    _print_table(rows)
    machine = f"{time.perf_counter() - began:.0f} s, Python {platform.python_version()}"
    print(f"{len(numbers)} cases, seed {given.seed}, {failures} failed; {machine}")
    return min(failures, 1)


class Row:
    """What is counted of one kind of attack on one file."""

    def __init__(self) -> None:
        self.refused = self.read = self.failed = 0
        self.slowest = 0.0

    def count(self, outcome: Outcome) -> None:
        self.failed += bool(outcome.wrong)
        self.refused += outcome.refused and not outcome.wrong
        self.read += not outcome.refused and not outcome.wrong
        self.slowest = max(self.slowest, outcome.seconds)


def _limit() -> None:
    """Leave little memory, so that a forged count cannot have it; end what hangs; take no warning but our own."""
    logging.disable()  # where runs were left
    size = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, resource.RLIM_INFINITY))
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", CycleWarning)

    def end(number: int, frame: object) -> None:
        raise Hanging

    signal.signal(signal.SIGALRM, end)


def _unless_slow(runs: Runs, seed: int, number: int) -> Outcome:
    """Do a case, and again if it was slow: on a machine that others use, the first time says nothing."""
    for _ in range(2):
        signal.alarm(_HANGS)
        outcome = runs.attack(seed, number)
        signal.alarm(0)
        if outcome.wrong or outcome.seconds <= LONGEST:
            return outcome
    return outcome._replace(wrong=f"a reader took {outcome.seconds:.1f} s, twice")


def _print_table(rows: dict[tuple[str, str], Row]) -> None:
    print(f"{'':45}  refused   read  failed  slowest")
    for (name, how), row in sorted(rows.items()):
        numbers = f"{row.refused:7}  {row.read:5}  {row.failed:6}  {1000 * row.slowest:4.0f} ms"
        print(f"{f'{name}: {how}':45}  {numbers}")


if __name__ == "__main__":
    sys.exit(main())
