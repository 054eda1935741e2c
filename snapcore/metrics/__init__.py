"""How good predictions are: of classes, of values, of values with a variance, and of their own uncertainty.

Everything is computed in float64, whatever came in. Nothing is normalised or repaired on the way: what is not a
probability, or not a class, is refused.
"""

from snapcore.metrics.arrays import ROUNDING, as_log_probabilities, as_probabilities
from snapcore.metrics.classes import RowScores, brier, ece, error, nll, perplexity, row_scores, score, summary
from snapcore.metrics.ranking import RiskCoverage, auroc, risk_coverage
from snapcore.metrics.values import crps, gaussian_nll, rmse

__all__ = [
    "ROUNDING",
    "RiskCoverage",
    "RowScores",
    "as_log_probabilities",
    "as_probabilities",
    "auroc",
    "brier",
    "crps",
    "ece",
    "error",
    "gaussian_nll",
    "nll",
    "perplexity",
    "risk_coverage",
    "rmse",
    "row_scores",
    "score",
    "summary",
]
