"""How good predictions are: of classes, of values, of values with a variance, and of their own uncertainty.

Everything is computed in float64, whatever came in. Nothing is normalised or repaired on the way: what is not a
probability, or not a class, is refused.

The first five take `probabilities` [examples, classes] and integer `labels` [examples]. With `log=True` the
probabilities are given as their logarithms, which hold what a probability underflows to 0 for.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError

ROUNDING = 1e-5  # how far beyond 0 and 1 the arithmetic of float32 may carry an honest probability


def error(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, log: bool = False) -> float:
    """Give the share of examples whose most probable class is not their label, in percent.

    error = 100 · mean(argmax_c p[i, c] ≠ y[i]), with p `probabilities` and y `labels`.
    Of several classes that are equally probable, the first counts as the prediction.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.
        log: whether `probabilities` are log-probabilities, each at most 0.

    Returns:
        A float in 0..100.

    Raises:
        DataError: shapes that do not fit, no examples, values that are no probabilities, labels that
            are not integers or name no class.

    Example:
        >>> error([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]], [0, 1, 1, 1])
        25.0
    """
    return _percent(row_scores(probabilities, labels, log=log).wrong)


def nll(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, log: bool = False) -> float:
    """Give the mean negative log-likelihood of the labels, in nats per example.

    nll = −mean(ln p[i, y[i]]), with p `probabilities` and y `labels`. It is computed in float64, and a
    probability below the smallest normal float64 (`np.finfo(float).tiny`, about 2.2e-308) counts as
    that, so a label that was given probability 0 costs 708.4 nats. Log-probabilities have no such floor: a label at
    −1,000 nats costs 1,000, and one at −inf makes the result infinite.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.
        log: whether `probabilities` are log-probabilities, each at most 0.

    Returns:
        A float in 0..708.4; at least 0 with `log`.

    Raises:
        DataError: as for `error`.

    Example:
        >>> round(nll([[0.5, 0.5], [0.2, 0.8]], [0, 1]), 4)
        0.4581
    """
    return _nll(_checked(probabilities, labels, log)[1])


def brier(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, log: bool = False) -> float:
    """Give the Brier score: the squared distance to the one-hot label, averaged over the examples.

    brier = mean_i sum_c (p[i, c] − [c = y[i]])², with p `probabilities` and y `labels`: the sum over all
    classes, not halved, so for distributions it runs from 0 to 2.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.
        log: whether `probabilities` are log-probabilities, each at most 0.

    Returns:
        A float, at least 0.

    Raises:
        DataError: as for `error`.

    Example:
        >>> round(brier([[0.5, 0.5], [0.2, 0.8]], [0, 1]), 4)
        0.29

    Source:
        Brier, Verification of forecasts expressed in terms of probability, 1950, equation 2.
    """
    p, _, y = _checked(probabilities, labels, log)
    return float(_squares(p, y).mean())


def ece(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, bins: int = 15, log: bool = False) -> float:
    """Give the expected calibration error: how far confidence and accuracy are apart, bin by bin.

    ece = sum_b |B_b| / n · |acc(B_b) − conf(B_b)|, where the n examples fall by their confidence, the
    probability of the most probable class, into `bins` intervals of equal width: (0, 1/bins],
    (1/bins, 2/bins] and so on. acc is the share of right predictions in a bin, conf its mean confidence.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.
        bins: number of intervals, at least 1; 15 is what the literature reports.
        log: whether `probabilities` are log-probabilities, each at most 0.

    Returns:
        A float in 0..1.

    Raises:
        DataError: as for `error`, or `bins` below 1.

    Example:
        >>> round(ece([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], [0, 1, 1]), 4)
        0.4

    Source:
        Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017, equation 3.
    """
    if bins < 1:
        raise DataError(f"bins must be at least 1, got {bins}; 15 is customary")
    rows = row_scores(probabilities, labels, log=log)
    return _gap(rows.confidence, rows.wrong, bins)


def score(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, log: bool = False) -> dict[str, float]:
    """Give all four measures of one set of predictions.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.
        log: whether `probabilities` are log-probabilities, each at most 0.

    Returns:
        `{"error", "nll", "brier", "ece"}`: percent, nats per example, and two plain numbers (15 bins).

    Raises:
        DataError: as for `error`.

    Example:
        >>> score([[1.0, 0.0], [0.0, 1.0]], [0, 1])
        {'error': 0.0, 'nll': 0.0, 'brier': 0.0, 'ece': 0.0}
    """
    return summary(row_scores(probabilities, labels, log=log))


class RowScores(NamedTuple):
    """What `row_scores` returns, each [examples] in float64."""

    wrong: npt.NDArray[np.float64]
    nll: npt.NDArray[np.float64]
    brier: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float64]


def row_scores(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, log: bool = False) -> RowScores:
    """Give each example's own scores; those of parts, joined, are those of the whole.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.
        log: whether `probabilities` are log-probabilities, each at most 0.

    Raises:
        DataError: as for `error`.
    """
    p, of_the_label, y = _checked(probabilities, labels, log)
    wrong = (p.argmax(axis=1) != y).astype(np.float64)
    return RowScores(wrong, -of_the_label, _squares(p, y), p.max(axis=1))


def summary(rows: RowScores) -> dict[str, float]:
    """Give the four measures of all rows, as `score` does."""
    return {
        "error": _percent(rows.wrong),
        "nll": _nll(rows.nll),
        "brier": float(rows.brier.mean()),
        "ece": _gap(rows.confidence, rows.wrong, bins=15),
    }


def perplexity(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, log: bool = False) -> float:
    """Give the perplexity of the labels: e to the power of `nll`, per token.

    Args:
        probabilities: [tokens, classes], finite, each in 0..1.
        labels: [tokens], integers in 0..classes−1; leave out those that a mask hides.
        log: whether `probabilities` are log-probabilities, each at most 0.

    Returns:
        A float, at least 1; inf where it exceeds float64.

    Raises:
        DataError: as for `error`.

    Example:
        >>> round(perplexity([[0.25, 0.75], [0.25, 0.75]], [0, 0]), 6)
        4.0
    """
    with np.errstate(over="ignore"):
        return float(np.exp(nll(probabilities, labels, log=log)))


def rmse(values: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Give the root of the mean squared error, in the targets' unit.

    rmse = sqrt(mean((v − y)²)), with v `values` and y `targets`, over all their axes.

    Args:
        values: predictions, of any shape, finite.
        targets: the same shape, finite.

    Returns:
        A float, at least 0.

    Raises:
        DataError: shapes that differ, no examples, values that are not finite.

    Example:
        >>> rmse([1.0, 3.0], [1.0, 1.0]) == 2**0.5
        True
    """
    v, y = _aligned({"values": values, "targets": targets})
    return float(np.sqrt(np.mean((v - y) ** 2)))


def gaussian_nll(mean: npt.ArrayLike, variance: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Give the mean negative log-likelihood of targets under normal distributions, in nats per target.

    nll = mean(½ ln(2π s) + (y − μ)² / (2 s)), with μ `mean`, s `variance` and y `targets`. It has the constant, and may
    be negative.

    Args:
        mean: of any shape, finite.
        variance: the same shape, above 0; not the standard deviation.
        targets: the same shape, finite.

    Raises:
        DataError: shapes that differ, no examples, values that are not finite, a variance that is not above 0.

    Example:
        >>> round(gaussian_nll([0.0], [1.0], [1.0]), 4)
        1.4189
    """
    mu, s, y = _gaussian(mean, variance, targets)
    return float(np.mean(0.5 * np.log(2 * np.pi * s) + (y - mu) ** 2 / (2 * s)))


def crps(
    mean: npt.ArrayLike, variance: npt.ArrayLike, targets: npt.ArrayLike, *, weights: npt.ArrayLike | None = None
) -> float:
    """Give the mean continuous ranked probability score of normal distributions, or of mixtures of them.

    For one distribution crps = σ (z (2Φ(z) − 1) + 2φ(z) − 1/√π) with z = (y − μ)/σ; for a mixture with weights w
    sum_i w_i A(y − μ_i, s_i) − ½ sum_ij w_i w_j A(μ_i − μ_j, s_i + s_j), A(d, s) = 2√s φ(d/√s) + d (2Φ(d/√s) − 1).

    Args:
        mean: the shape of the targets; or [members, …] for a mixture.
        variance: the same shape, above 0; not the standard deviation.
        targets: finite, of any shape.
        weights: one number per member of a mixture, not negative; equal by default.

    Returns:
        A float, at least 0, in the targets' unit. For a variance near 0 it is the mean absolute error.

    Raises:
        DataError: as for `gaussian_nll`, or weights that do not fit.

    Example:
        >>> round(crps([0.0], [1.0], [1.0]), 4)
        0.6024

    Source:
        Grimit, Gneiting, Berrocal, Johnson, The continuous ranked probability score for circular variables and its
        application to mesoscale forecast ensemble verification, 2006, equation 5.
    """
    y = _as_array(targets, "targets")
    mu = _as_array(mean, "mean")
    mixture = mu.ndim == y.ndim + 1 and mu.shape[1:] == y.shape
    mu, s, y = _gaussian(mu, variance, np.broadcast_to(y, mu.shape) if mixture else y)
    if not mixture:
        mu, s, y = mu[None], s[None], y[None]
    w = np.ones(len(mu)) if weights is None else np.asarray(weights, np.float64)
    if w.shape != mu.shape[:1] or not (w.min() >= 0 and 0 < w.sum() < np.inf):
        raise DataError(f"weights must be {len(mu)} numbers, not negative and not all 0, got {w.tolist()}")
    w = w / w.sum()
    to_target = np.tensordot(w, _folded(y - mu, s), 1)
    between = np.zeros_like(to_target)
    for i in range(len(mu)):  # one member against those from it on: M² arrays at once would not fit
        pairs = w[i] * w[i:] * np.where(np.arange(i, len(mu)) > i, 2.0, 1.0)
        between += np.tensordot(pairs, _folded(mu[i] - mu[i:], s[i] + s[i:]), 1)
    return float(np.mean(to_target - between / 2))


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
    values, flags = _aligned({"scores": scores, "positives": positives})
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
    values, lost = _aligned({"scores": scores, "losses": losses})
    values, lost = values.ravel(), lost.ravel()
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=lost) / sizes
    answered = np.arange(1, len(values) + 1)
    risk = np.cumsum(np.repeat(means, sizes)) / answered
    return RiskCoverage(answered / len(values), risk, float(risk.mean()))


def as_probabilities(values: npt.ArrayLike, subject: str) -> npt.NDArray[Any]:
    """Give `values` as an array of their own dtype, sure to be finite real numbers in 0..1.

    Args:
        values: anything NumPy makes a regular array of, of any shape.
        subject: what to call the values in a message.

    Returns:
        The same array where `values` was one; no copy, and nothing clipped.

    Raises:
        DataError: ragged, not real numbers, or some value outside 0..1 (by more than rounding).

    Example:
        >>> as_probabilities([0.25, 0.75], "probabilities")
        array([0.25, 0.75])
    """
    array = _as_array(values, subject)
    if not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise DataError(f"{subject} must be real numbers, got dtype {array.dtype}")
    # min and max carry NaN along and need no array of their own
    if array.size and not (float(array.min()) >= -ROUNDING and float(array.max()) <= 1 + ROUNDING):
        exact = array.astype(np.float64)
        position = np.argwhere(~((exact >= -ROUNDING) & (exact <= 1 + ROUNDING)))[0]
        found = f"{exact[tuple(position)]:g} at {position.tolist()}"
        raise DataError(
            f"{subject} must be finite and in 0..1, got {found}; apply softmax first, or pass log=True for logarithms"
        )
    return array


def as_log_probabilities(values: npt.ArrayLike, subject: str) -> npt.NDArray[Any]:
    """Give `values` as an array of their own dtype, sure to be logarithms of probabilities: at most 0, or −inf.

    Args:
        values: anything NumPy makes a regular array of, of any shape.
        subject: what to call the values in a message.

    Returns:
        The same array where `values` was one; no copy, and nothing clipped.

    Raises:
        DataError: ragged, not real numbers, NaN, or some value above 0 (by more than rounding).

    Example:
        >>> as_log_probabilities([-1000.0, 0.0], "log-probabilities")
        array([-1000.,     0.])
    """
    array = _as_array(values, subject)
    if not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise DataError(f"{subject} must be real numbers, got dtype {array.dtype}")
    if array.size and not float(array.max()) <= ROUNDING:  # max carries NaN along
        position = np.argwhere(~(array.astype(np.float64) <= ROUNDING))[0]
        raise DataError(
            f"{subject} must be at most 0 and not NaN, got {array[tuple(position)]:g} at {position.tolist()}; "
            "apply log_softmax first"
        )
    return array


def _as_array(values: npt.ArrayLike, subject: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as exc:
        raise DataError(f"{subject} must be a regular array of numbers: {exc}") from exc


def _checked(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, log: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.integer[Any]]]:
    """Return the probabilities, the logarithm of each label's, and the labels."""
    check = as_log_probabilities if log else as_probabilities
    p, y = check(probabilities, "log-probabilities" if log else "probabilities"), _as_array(labels, "labels")
    if p.ndim != 2:
        raise DataError(
            f"probabilities must be [examples, classes], got shape {p.shape}; "
            "flatten all other axes into examples, with the classes last"
        )
    if not p.size:
        raise DataError(f"at least one example and one class are required, got shape {p.shape}")
    if y.shape != p.shape[:1]:
        raise DataError(f"labels must be [examples={len(p)}], got shape {y.shape}; give one class number per example")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"labels must be integers, got dtype {y.dtype}; give class numbers")
    _check_range(y, p.shape[1])
    p = p.astype(np.float64, copy=False)
    of_the_label = p[np.arange(len(y)), y]
    if log:
        return np.exp(p), np.minimum(of_the_label, 0.0), y
    return p, np.log(np.clip(of_the_label, np.finfo(np.float64).tiny, 1.0)), y


def _check_range(labels: npt.NDArray[np.integer[Any]], n_classes: int) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if outside.size:
        raise DataError(
            f"labels must be in 0..{n_classes - 1}, got {labels[outside[0]]} at position {outside[0]}; "
            "number the classes from 0, one for each column of probabilities"
        )


def _percent(wrong: npt.NDArray[np.float64]) -> float:
    return 100.0 * int(np.count_nonzero(wrong)) / len(wrong)


def _nll(of_the_label: npt.NDArray[np.float64]) -> float:
    return abs(float(of_the_label.mean()))  # abs: a perfect score reads 0.0, not -0.0


def _squares(p: npt.NDArray[np.float64], y: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    difference = p.copy()
    difference[np.arange(len(y)), y] -= 1.0
    return np.asarray(np.einsum("nc,nc->n", difference, difference))


def _gap(confidence: npt.NDArray[np.float64], wrong: npt.NDArray[np.float64], bins: int) -> float:
    which = np.digitize(confidence, np.linspace(0.0, 1.0, bins + 1)[1:-1], right=True)
    # the sizes of the bins cancel: |B| · |acc − conf| is the sum of (right − confidence) over B
    gaps = np.bincount(which, weights=(1.0 - wrong) - confidence)
    return float(np.abs(gaps).sum()) / len(wrong)


def _aligned(arrays: dict[str, npt.ArrayLike]) -> list[npt.NDArray[np.float64]]:
    """Return arrays in float64, sure to be finite and of one shape."""
    found = []
    for name, values in arrays.items():
        array = _as_array(values, name)
        if not (array.dtype == bool or np.can_cast(array.dtype, np.float64, "same_kind")):
            raise DataError(f"{name} must be real numbers, got dtype {array.dtype}")
        found.append(array.astype(np.float64, copy=False))
        if not found[-1].size:
            raise DataError(f"at least one example is required, got shape {array.shape} for {name}")
        if array.shape != found[0].shape:
            raise DataError(f"{' and '.join(arrays)} must have one shape, got {array.shape} and {found[0].shape}")
        if not np.isfinite(found[-1]).all():
            position = np.argwhere(~np.isfinite(found[-1]))[0]
            raise DataError(f"{name} must be finite, got {array[tuple(position)]} at {position.tolist()}")
    return found


def _gaussian(mean: npt.ArrayLike, variance: npt.ArrayLike, targets: npt.ArrayLike) -> list[npt.NDArray[np.float64]]:
    found = _aligned({"mean": mean, "variance": variance, "targets": targets})
    if not found[1].min() > 0:
        raise DataError(f"variance must be above 0, got {found[1].min():g}; take exp of a log-variance first")
    return found


def _as_flags(values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.bool_]:
    if not ((values == 0) | (values == 1)).all():
        raise DataError(f"{name} must be booleans, or 0 and 1, got {values[(values != 0) & (values != 1)][0]:g}")
    return np.asarray(values == 1)


def _folded(d: npt.NDArray[np.float64], variance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return E|X| of a normal X with mean `d`."""
    z = d / np.sqrt(variance)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    erf = np.fromiter(map(math.erf, (z / np.sqrt(2)).flat), np.float64, z.size).reshape(z.shape)  # 2Φ(z) − 1
    return np.asarray(2 * np.sqrt(variance) * density + d * erf)
