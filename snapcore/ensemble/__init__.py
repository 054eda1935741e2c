"""What members are worth together: whose files they are, how their probabilities become one, and how fast.

The adapters and the application import from here, never from a file behind this door.
"""

from snapcore.ensemble.combine import MemberSequence, combine, prefix_curve
from snapcore.ensemble.members import Directory, member_files
from snapcore.ensemble.outputs import ALREADY_PROBABILITIES, are_probabilities, refuse_one_output, refuse_probabilities
from snapcore.ensemble.tuning import ROUNDS, TOLERANCE, Trial, TuningReport, deviation, tune

__all__ = [
    "ALREADY_PROBABILITIES",
    "ROUNDS",
    "TOLERANCE",
    "Directory",
    "MemberSequence",
    "Trial",
    "TuningReport",
    "are_probabilities",
    "combine",
    "deviation",
    "member_files",
    "prefix_curve",
    "refuse_one_output",
    "refuse_probabilities",
    "tune",
]
