"""How good predicted values are: plain ones, normal distributions, and mixtures of these."""

import math

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError
from snapcore.metrics.arrays import aligned, as_array


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
    v, y = aligned({"values": values, "targets": targets})
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
    y = as_array(targets, "targets")
    mu = as_array(mean, "mean")
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


def _gaussian(mean: npt.ArrayLike, variance: npt.ArrayLike, targets: npt.ArrayLike) -> list[npt.NDArray[np.float64]]:
    found = aligned({"mean": mean, "variance": variance, "targets": targets})
    if not found[1].min() > 0:
        raise DataError(f"variance must be above 0, got {found[1].min():g}; take exp of a log-variance first")
    return found


def _folded(d: npt.NDArray[np.float64], variance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return E|X| of a normal X with mean `d`."""
    z = d / np.sqrt(variance)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    erf = np.fromiter(map(math.erf, (z / np.sqrt(2)).flat), np.float64, z.size).reshape(z.shape)  # 2Φ(z) − 1
    return np.asarray(2 * np.sqrt(variance) * density + d * erf)
