"""What happens during training: the program is walked, members and resume points are taken and written.

The adapters and the application import from here, never from a file behind this door.
"""

from snapcore.run.batches import EpochBatches
from snapcore.run.counted import CountedRun
from snapcore.run.execute import execute
from snapcore.run.group import Alone, Group
from snapcore.run.random_state import random_state, set_random_state
from snapcore.run.recorder import Recorder
from snapcore.run.saving import WEIGHTS
from snapcore.run.source import Source, require_fresh
from snapcore.run.trainer import Position, check_length

__all__ = [
    "WEIGHTS",
    "Alone",
    "CountedRun",
    "EpochBatches",
    "Group",
    "Position",
    "Recorder",
    "Source",
    "check_length",
    "execute",
    "random_state",
    "require_fresh",
    "set_random_state",
]
