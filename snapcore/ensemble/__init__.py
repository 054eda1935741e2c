"""What members are worth together: whose files they are, how their probabilities become one, and how fast.

The adapters and the application import from here, never from a file behind this door.
"""

from snapcore.ensemble.cascade import cascade_batch, fit_cascade, run_cascade
from snapcore.ensemble.combine import MemberSequence, combine
from snapcore.ensemble.fitting import FEW, RunsOffError, fit_temperature, fit_weights, select
from snapcore.ensemble.members import Directory, check_members, member_files, recipe_files, refuse_like, refuse_mapped
from snapcore.ensemble.outputs import (
    ACTIVATIONS,
    ALREADY_PROBABILITIES,
    Output,
    are_probabilities,
    check_activation,
    check_pairs,
    pick,
    predict,
    reason,
    refuse_equal_members,
    refuse_one_output,
    refuse_probabilities,
    softmax_axis,
)
from snapcore.ensemble.pooling import Operations, Pooling, checked_recipe
from snapcore.ensemble.predictions import KINDS, Predictions
from snapcore.ensemble.recipe import RULES, Cascade, Fitted, Recipe, as_recipe
from snapcore.ensemble.scoring import prefix_curve, score_predictions
from snapcore.ensemble.soup import Interpolation, interpolation, mean_weights, soup
from snapcore.ensemble.tuning import ROUNDS, TOLERANCE, Trial, TuningReport, check_strategy, deviation, tune
from snapcore.ensemble.uncertainty import Uncertainty, rank_correlation, uncertainty, uncertainty_quality

__all__ = [
    "ACTIVATIONS",
    "ALREADY_PROBABILITIES",
    "FEW",
    "KINDS",
    "ROUNDS",
    "RULES",
    "TOLERANCE",
    "Cascade",
    "Directory",
    "Fitted",
    "Interpolation",
    "MemberSequence",
    "Operations",
    "Output",
    "Pooling",
    "Predictions",
    "Recipe",
    "RunsOffError",
    "Trial",
    "TuningReport",
    "Uncertainty",
    "are_probabilities",
    "as_recipe",
    "cascade_batch",
    "check_activation",
    "check_members",
    "check_pairs",
    "check_strategy",
    "checked_recipe",
    "combine",
    "deviation",
    "fit_cascade",
    "fit_temperature",
    "fit_weights",
    "interpolation",
    "mean_weights",
    "member_files",
    "pick",
    "predict",
    "prefix_curve",
    "rank_correlation",
    "reason",
    "recipe_files",
    "refuse_equal_members",
    "refuse_like",
    "refuse_mapped",
    "refuse_one_output",
    "refuse_probabilities",
    "run_cascade",
    "score_predictions",
    "select",
    "softmax_axis",
    "soup",
    "tune",
    "uncertainty",
    "uncertainty_quality",
]
