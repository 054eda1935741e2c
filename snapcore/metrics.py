"""How good predicted probabilities are: error, negative log-likelihood, Brier score, calibration error.

Every function takes `probabilities` [examples, classes] and integer `labels` [examples] and gives one
Python float, computed in float64 whatever came in. Nothing is normalised or repaired on the way: what
is not a probability, or not a class, is refused.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError

ROUNDING = 1e-5  # how far beyond 0 and 1 the arithmetic of float32 may carry an honest probability


def error(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give the share of examples whose most probable class is not their label, in percent.

    error = 100 · mean(argmax_c p[i, c] ≠ y[i]), with p `probabilities` and y `labels`.
    Of several classes that are equally probable, the first counts as the prediction.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.

    Returns:
        A float in 0..100.

    Raises:
        DataError: shapes that do not fit, no examples, values that are no probabilities, labels that
            are not integers or name no class.

    Example:
        >>> error([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]], [0, 1, 1, 1])
        25.0
    """
    return _error(*_checked(probabilities, labels))


def nll(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give the mean negative log-likelihood of the labels, in nats per example.

    nll = −mean(ln p[i, y[i]]), with p `probabilities` and y `labels`. It is computed in float64, and a
    probability below the smallest normal float64 (`np.finfo(float).tiny`, about 2.2e-308) counts as
    that, so a label that was given probability 0 costs 708.4 nats and the result is always finite.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.

    Returns:
        A float in 0..708.4.

    Raises:
        DataError: as for `error`.

    Example:
        >>> round(nll([[0.5, 0.5], [0.2, 0.8]], [0, 1]), 4)
        0.4581
    """
    return _nll(*_checked(probabilities, labels))


def brier(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give the Brier score: the squared distance to the one-hot label, averaged over the examples.

    brier = mean_i sum_c (p[i, c] − [c = y[i]])², with p `probabilities` and y `labels`: the sum over all
    classes, not halved, so for distributions it runs from 0 to 2.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.

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
    return _brier(*_checked(probabilities, labels))


def ece(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, bins: int = 15) -> float:
    """Give the expected calibration error: how far confidence and accuracy are apart, bin by bin.

    ece = sum_b |B_b| / n · |acc(B_b) − conf(B_b)|, where the n examples fall by their confidence, the
    probability of the most probable class, into `bins` intervals of equal width: (0, 1/bins],
    (1/bins, 2/bins] and so on. acc is the share of right predictions in a bin, conf its mean confidence.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.
        bins: number of intervals, at least 1; 15 is what the literature reports.

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
    return _ece(*_checked(probabilities, labels), bins)


def score(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """Give all four measures of one set of predictions.

    Args:
        probabilities: [examples, classes], finite, each in 0..1.
        labels: [examples], integers in 0..classes−1.

    Returns:
        `{"error", "nll", "brier", "ece"}`: percent, nats per example, and two plain numbers (15 bins).

    Raises:
        DataError: as for `error`.

    Example:
        >>> score([[1.0, 0.0], [0.0, 1.0]], [0, 1])
        {'error': 0.0, 'nll': 0.0, 'brier': 0.0, 'ece': 0.0}
    """
    p, y = _checked(probabilities, labels)
    return {"error": _error(p, y), "nll": _nll(p, y), "brier": _brier(p, y), "ece": _ece(p, y, bins=15)}


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
        raise DataError(f"{subject} must be finite and in 0..1, got {found}; apply softmax first")
    return array


def _as_array(values: npt.ArrayLike, subject: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as exc:
        raise DataError(f"{subject} must be a regular array of numbers: {exc}") from exc


def _checked(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.integer[Any]]]:
    p, y = as_probabilities(probabilities, "probabilities"), _as_array(labels, "labels")
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
    return p.astype(np.float64, copy=False), y


def _check_range(labels: npt.NDArray[np.integer[Any]], n_classes: int) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if outside.size:
        raise DataError(
            f"labels must be in 0..{n_classes - 1}, got {labels[outside[0]]} at position {outside[0]}; "
            "number the classes from 0, one for each column of probabilities"
        )


def _error(p: npt.NDArray[np.float64], y: npt.NDArray[np.integer[Any]]) -> float:
    return 100.0 * int(np.count_nonzero(p.argmax(axis=1) != y)) / len(y)


def _nll(p: npt.NDArray[np.float64], y: npt.NDArray[np.integer[Any]]) -> float:
    of_the_label = np.clip(p[np.arange(len(y)), y], np.finfo(np.float64).tiny, 1.0)
    return abs(float(np.log(of_the_label).mean()))  # abs: a perfect score reads 0.0, not -0.0


def _brier(p: npt.NDArray[np.float64], y: npt.NDArray[np.integer[Any]]) -> float:
    difference = p.copy()
    difference[np.arange(len(y)), y] -= 1.0
    return float(np.einsum("nc,nc->", difference, difference)) / len(y)


def _ece(p: npt.NDArray[np.float64], y: npt.NDArray[np.integer[Any]], bins: int) -> float:
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    which = np.digitize(confidence, np.linspace(0.0, 1.0, bins + 1)[1:-1], right=True)
    # the sizes of the bins cancel: |B| · |acc − conf| is the sum of (right − confidence) over B
    gaps = np.bincount(which, weights=right - confidence)
    return float(np.abs(gaps).sum()) / len(y)
