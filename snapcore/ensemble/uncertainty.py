"""How unsure an ensemble is of each example, in parts: what all members find unsure, and what they disagree about."""

import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snapcore.ensemble.combine import check_weights, pool
from snapcore.ensemble.predictions import Floats, Predictions, log1mexp
from snapcore.errors import DataError
from snapcore.metrics import auroc, risk_coverage

_ALIKE = 0.9


class Uncertainty(NamedTuple):
    """What `uncertainty` returns, each [examples, …] in float64.

    Attributes:
        total: entropy of the mean prediction, in nats; the variance of the mixture for values and gaussian members.
        aleatoric: mean entropy of the members; the mean of their variances, 0 for plain values, which have none.
        epistemic: the mutual information of prediction and member, total − aleatoric, not below 0; the variance of the
            members' means. 0 where all members agree.
        disagreement: the share of members whose most probable class is not the ensemble's; for labels the share of
            decisions at 0.5 that differ; NaN for values and gaussian members, which decide nothing.
    """

    total: Floats
    aleatoric: Floats
    epistemic: Floats
    disagreement: Floats

    def summed(self) -> "Uncertainty":
        """Return one number per example, summed over all other axes, such as the tokens of a sequence."""
        return Uncertainty(*(each.sum(axis=tuple(range(1, each.ndim))) for each in self))


def uncertainty(predictions: Predictions, *, weights: npt.ArrayLike | None = None) -> Uncertainty:
    """Split each example's uncertainty into what is in the data and what is in the weights.

    Args:
        predictions: of any kind; labels are not needed, but where one says `ignore`, its place counts 0.
        weights: one number per member, not negative; equal by default.

    Returns:
        [examples, …]: for dense outputs and tokens one number for each; for labels summed over an example's labels.

    Raises:
        DataError: weights do not fit.

    Example:
        >>> sure, unsure = [[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]
        >>> found = uncertainty(Predictions.from_probabilities([sure, unsure]))
        >>> found.epistemic.round(3).tolist(), found.aleatoric.round(3).tolist()
        ([0.693, 0.0], [0.0, 0.693])

    Source:
        Depeweg, Hernández-Lobato, Doshi-Velez, Udluft, Decomposition of uncertainty in Bayesian deep learning for
        efficient and risk-sensitive learning, ICML 2018.
    """
    shares = check_weights(weights, len(predictions))
    shares = shares / shares.sum()
    parts = [_of_block(predictions.kind, block, shares) for _, block in predictions.blocks()]
    found = Uncertainty(*map(np.concatenate, zip(*parts, strict=True)))
    if predictions.ignore is not None and predictions.labels is not None:
        counts = predictions.labels != predictions.ignore
        found = Uncertainty(*(np.where(counts, each, 0.0) for each in found))
    return found


def uncertainty_quality(
    predictions: Predictions, *, weights: npt.ArrayLike | None = None
) -> dict[str, dict[str, float]]:
    """Measure how well each part of the uncertainty tells wrong predictions from right ones.

    Warns with `UserWarning` where aleatoric and epistemic rank the examples alike (above 0.9): one number is enough.

    Args:
        predictions: of classes, with labels.
        weights: one number per member, not negative; equal by default.

    Returns:
        For total, aleatoric, epistemic and disagreement `{"auroc", "area"}`: of errors, and under the risk-coverage
        curve of the error, in 0..1; and `{"parts": {"rank_correlation"}}`, Spearman's of aleatoric and epistemic, NaN
        where one of them is constant.

    Raises:
        DataError: labels are missing, all predictions are right, or all wrong.
    """
    if predictions.kind != "classes":
        raise DataError(f"errors are of classes alone, got predictions of kind {predictions.kind!r}")
    shares = check_weights(weights, len(predictions))
    found = uncertainty(predictions, weights=shares)
    decided = [pool("classes", block, shares).argmax(axis=-1) for _, block in predictions.blocks()]
    labels = predictions.labels_of(slice(None))
    counts = np.ones(labels.shape, bool) if predictions.ignore is None else labels != predictions.ignore
    wrong = (np.concatenate(decided) != labels)[counts]
    if wrong.all() or not wrong.any():
        raise DataError(
            "some predictions must be wrong and some right for uncertainty to tell them apart, got "
            f"{np.count_nonzero(wrong)} wrong of {len(wrong)}: take more examples"
        )
    quality = {
        name: {"auroc": auroc(part[counts], wrong), "area": risk_coverage(part[counts], wrong).area}
        for name, part in found._asdict().items()
    }
    correlation = rank_correlation(found.aleatoric[counts], found.epistemic[counts])
    if correlation > _ALIKE:
        warnings.warn(
            f"aleatoric and epistemic uncertainty rank the examples alike (rank correlation {correlation:.2f}): use "
            "the total alone",
            stacklevel=2,
        )
    return {**quality, "parts": {"rank_correlation": correlation}}


def rank_correlation(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Return Spearman's rank correlation, with mean ranks for equal values; NaN where one side is constant.

    Example:
        >>> rank_correlation([1, 2, 3], [10, 100, 1000])
        1.0
    """
    ranks = []
    for values in (a, b):
        _, inverse, sizes = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(sizes) - (sizes - 1) / 2)[inverse.ravel()])
    if min(np.ptp(each) for each in ranks) == 0:
        return float("nan")
    one, other = (each - each.mean() for each in ranks)
    return round(float(one @ other / np.sqrt((one @ one) * (other @ other))), 12)


def _of_block(kind: str, block: Floats, shares: Floats) -> Uncertainty:
    pooled = pool(kind, block, shares)
    if kind in ("values", "gaussian"):
        means = block[..., 0] if kind == "gaussian" else block
        within = np.tensordot(shares, block[..., 1], 1) if kind == "gaussian" else np.zeros(means.shape[1:])
        between = np.tensordot(shares, (means - np.tensordot(shares, means, 1)) ** 2, 1)
        return Uncertainty(within + between, within, between, np.full(between.shape, np.nan))
    if kind == "labels":
        total, each = _binary_entropy(pooled).sum(-1), _binary_entropy(block).sum(-1)
        others = ((block > np.log(0.5)) != (pooled > np.log(0.5))).mean(-1)
    else:
        total, each = _entropy(pooled), _entropy(block)
        others = (block.argmax(-1) != pooled.argmax(-1)).astype(np.float64)
    aleatoric = np.tensordot(shares, each, 1)
    disagreement = np.asarray(np.tensordot(shares, others, 1), np.float64)
    return Uncertainty(total, aleatoric, np.maximum(total - aleatoric, 0.0), disagreement)


def _entropy(logs: Floats) -> Floats:
    p = np.exp(logs)
    return np.asarray(-np.einsum("...c,...c->...", p, np.where(p > 0, logs, 0.0)))


def _binary_entropy(logs: Floats) -> Floats:
    p, other = np.exp(logs), log1mexp(logs)
    return np.asarray(-p * np.where(p > 0, logs, 0.0) - np.exp(other) * np.where(p < 1, other, 0.0))
