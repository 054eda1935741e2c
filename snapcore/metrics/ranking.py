"""How well a score ranks examples, such as the unsure before the sure."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError
from snapcore.metrics.arrays import aligned


def auroc(scores: npt.ArrayLike, positives: npt.ArrayLike) -> float:
    """Give the area under the ROC curve: how often a positive example has the higher score.

    The share of pairs of a positive and a negative example in which the positive has the higher score; equal scores
    count half. For uncertainty: `scores` are how unsure, `positives` which predictions are wrong.

    Args:
        scores: [examples], finite; higher for what is taken to be positive.
        positives: [examples], booleans or 0 and 1.

    Returns:
        A float in 0..1; 0.5 for scores that say nothing.

    Raises:
        DataError: shapes that differ, scores that are not finite, all examples positive or none.

    Example:
        >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
        0.75
    """
    values, flags = aligned({"scores": scores, "positives": positives})
    values, chosen = values.ravel(), _as_flags(flags.ravel(), "positives")
    count = int(chosen.sum())
    if count in (0, len(chosen)):
        raise DataError(f"positives must be some and not all of the examples, got {count} of {len(chosen)}")
    # ranks of equal scores are their mean
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[inverse]
    pairs = count * (len(chosen) - count)
    return float((ranks[chosen].sum() - count * (count + 1) / 2) / pairs)


class RiskCoverage(NamedTuple):
    """What `risk_coverage` returns.

    Attributes:
        coverage: [examples], the share of examples that are answered: 1/n, 2/n … 1.
        risk: [examples], the mean loss among them.
        area: under the curve, the mean of `risk`. Lower is better.
    """

    coverage: npt.NDArray[np.float64]
    risk: npt.NDArray[np.float64]
    area: float


def risk_coverage(scores: npt.ArrayLike, losses: npt.ArrayLike) -> RiskCoverage:
    """Give the risk-coverage curve: the loss among the surest examples, for every share of examples that is answered.

    Examples are answered from the lowest score to the highest. Those with equal scores count with their mean loss, so
    their order does not matter.

    Args:
        scores: [examples], finite; how unsure each prediction is.
        losses: [examples], finite; 1 for a wrong prediction and 0 for a right one, or any other loss.

    Raises:
        DataError: shapes that differ, no examples, values that are not finite.

    Example:
        >>> risk_coverage([0.1, 0.2, 0.9, 0.4], [0, 0, 1, 0]).risk.tolist()
        [0.0, 0.0, 0.0, 0.25]

    Source:
        Geifman, El-Yaniv, Selective Classification for Deep Neural Networks, NeurIPS 2017.
    """
    values, lost = aligned({"scores": scores, "losses": losses})
    values, lost = values.ravel(), lost.ravel()
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=lost) / sizes
    answered = np.arange(1, len(values) + 1)
    risk = np.cumsum(np.repeat(means, sizes)) / answered
    return RiskCoverage(answered / len(values), risk, float(risk.mean()))


def _as_flags(values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.bool_]:
    if not ((values == 0) | (values == 1)).all():
        raise DataError(f"{name} must be booleans, or 0 and 1, got {values[(values != 0) & (values != 1)][0]:g}")
    return np.asarray(values == 1)
