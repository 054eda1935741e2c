"""How good predictions of classes are: error, NLL, Brier score, calibration.

All take `probabilities` [examples, classes] and integer `labels` [examples]. With `log=True` the probabilities are
given as their logarithms, which hold what a probability underflows to 0 for.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError
from snapcore.metrics.arrays import as_array, as_log_probabilities, as_probabilities


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


def _checked(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, log: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.integer[Any]]]:
    """Return the probabilities, the logarithm of each label's, and the labels."""
    check = as_log_probabilities if log else as_probabilities
    p, y = check(probabilities, "log-probabilities" if log else "probabilities"), as_array(labels, "labels")
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
