"""Everything that snapcore raises on purpose, as one tree under `SnapcoreError`.

Each class also inherits the built-in exception that a caller would reach for, so `except ValueError` around a schedule
and `except OSError` around a store keep working. A message says what was required, what came, and what to do.
"""


class SnapcoreError(Exception):
    """Base class of all errors of snapcore."""


class ScheduleError(SnapcoreError, ValueError):
    """Invalid schedule arguments, or a step outside the schedule."""


class ProtocolError(SnapcoreError, RuntimeError):
    """A call that the program does not allow now; the run's state is unchanged."""


class DataError(SnapcoreError, ValueError):
    """Arrays or files of the wrong shape, type or content."""


class DivergedError(SnapcoreError, ArithmeticError):
    """A loss or weight is NaN or infinite; the members taken before are kept."""


class StoreError(SnapcoreError, OSError):
    """A run directory that cannot be opened, read or written."""


class CorruptSnapshotError(StoreError):
    """A file of a run is missing, truncated, altered or swapped."""


class BackendNotFoundError(SnapcoreError, LookupError):
    """The backend is not installed; the message names the extra to install."""


class CycleWarning(UserWarning):
    """The schedule is valid, but a cycle is missing or cut short, or a snapshot is late."""
