"""How the parts that time snapshots wait until the last one is on disk."""

import time
from pathlib import Path

from snapcore.store import SnapshotStore

LONGEST = 60.0


def wait_for_members(directory: Path, count: int) -> None:
    """Return once the run's directory lists so many members: what is written behind the loop is then done.

    Raises:
        TimeoutError: a minute did not do.
    """
    end = time.monotonic() + LONGEST
    while len(SnapshotStore(directory).members) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"{directory} must list {count} members after {LONGEST:.0f} s: see the log")
        time.sleep(0.005)
