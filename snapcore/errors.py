"""Everything that snapcore raises on purpose, as one tree under `SnapcoreError`.

Each class also inherits the built-in exception a caller would reach for, so `except ValueError`
around a schedule and `except OSError` around a store keep working. A message says what was
required, what came instead, and what to do about it.
"""


class SnapcoreError(Exception):
    """Root of the tree: catch this to catch whatever snapcore refuses."""


class ScheduleError(SnapcoreError, ValueError):
    """A schedule was asked for with values that describe none, or at a step that cannot be."""


class ProtocolError(SnapcoreError, RuntimeError):
    """An event that the program does not allow now; the run's state is as it was before."""


class DataError(SnapcoreError, ValueError):
    """Arrays or files that are not what they were said to be."""


class DivergedError(SnapcoreError, ArithmeticError):
    """Training left the finite numbers; the members taken before are kept."""


class StoreError(SnapcoreError, OSError):
    """A run directory that cannot be read, written or opened as asked."""


class CorruptSnapshotError(StoreError):
    """A file of a run is not what was written: truncated, altered, swapped or missing."""


class BackendNotFoundError(SnapcoreError, LookupError):
    """No such backend is installed; the message names the extra that brings it."""


class CycleWarning(UserWarning):
    """The schedule runs, but a cycle is missing or a member is not taken at the end of one."""
