"""What happens while training goes on: the program is walked, members and resume points are taken and written.

The adapters and the application import from here, never from a file behind this door.
"""

from snapcore.run.counted import Calls, Ending, FollowedLoader
from snapcore.run.execute import execute
from snapcore.run.group import Alone, Group
from snapcore.run.random_state import random_state, set_random_state
from snapcore.run.recorder import AGREE_EVERY, WEIGHTS, Recorder, restart_weights
from snapcore.run.trainer import Place, check_length

__all__ = [
    "AGREE_EVERY",
    "WEIGHTS",
    "Alone",
    "Calls",
    "Ending",
    "FollowedLoader",
    "Group",
    "Place",
    "Recorder",
    "check_length",
    "execute",
    "random_state",
    "restart_weights",
    "set_random_state",
]
