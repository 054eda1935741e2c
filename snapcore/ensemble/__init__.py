"""What members are worth together: whose files they are, how their probabilities become one, and how fast.

The adapters and the application import from here, never from a file behind this door.
"""

from snapcore.ensemble.combine import MemberSequence, combine, prefix_curve
from snapcore.ensemble.members import Directory, check_members, member_files, refuse_like
from snapcore.ensemble.outputs import (
    ACTIVATIONS,
    ALREADY_PROBABILITIES,
    are_probabilities,
    check_activation,
    refuse_one_output,
    refuse_probabilities,
)
from snapcore.ensemble.tuning import ROUNDS, TOLERANCE, Trial, TuningReport, check_strategy, deviation, tune

__all__ = [
    "ACTIVATIONS",
    "ALREADY_PROBABILITIES",
    "ROUNDS",
    "TOLERANCE",
    "Directory",
    "MemberSequence",
    "Trial",
    "TuningReport",
    "are_probabilities",
    "check_activation",
    "check_members",
    "check_strategy",
    "combine",
    "deviation",
    "member_files",
    "prefix_curve",
    "refuse_like",
    "refuse_one_output",
    "refuse_probabilities",
    "tune",
]
