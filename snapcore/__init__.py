"""snapcore: train once, get M models.

The names below need nothing but the standard library. The other parts are imported by name: `snapcore.store`,
`snapcore.ensemble`, `snapcore.metrics`, `snapcore.run`; the adapters are `snapcore_torch`, `snapcore_jax`,
`snapcore_keras` and `snapcore_tensorflow`.
"""

from snapcore.errors import (
    BackendNotFoundError,
    CorruptSnapshotError,
    CycleWarning,
    DataError,
    DivergedError,
    ProtocolError,
    ScheduleError,
    SnapcoreError,
    StoreError,
)
from snapcore.protocol import (
    METHODS,
    Cursor,
    Program,
    Restart,
    Snapshot,
    Stop,
    Train,
    program,
    program_from_dict,
)
from snapcore.schedule import CosineCycles, Cycles, Schedule, StepDecay, register_shape, schedule_from_dict

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BackendNotFoundError",
    "CorruptSnapshotError",
    "CosineCycles",
    "Cursor",
    "CycleWarning",
    "Cycles",
    "DataError",
    "DivergedError",
    "Program",
    "ProtocolError",
    "Restart",
    "Schedule",
    "ScheduleError",
    "SnapcoreError",
    "Snapshot",
    "StepDecay",
    "Stop",
    "StoreError",
    "Train",
    "program",
    "program_from_dict",
    "register_shape",
    "schedule_from_dict",
]
