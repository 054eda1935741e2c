"""The minimum of a smooth convex function over weights that are not negative and sum to 1."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Oracle = Callable[[Floats], tuple[float, Floats, Floats]]

_SMALL = 1e-5  # a weight that may as well be 0, if the optimum allows


def minimise(oracle: Oracle, size: int, *, tolerance: float) -> tuple[Floats, float]:
    """Return weights, and a bound on how far their value is above the minimum.

    An interior-point method: Newton's steps on f(w) − μ · sum ln w, along the plane on which weights sum to 1, for ever
    smaller μ. The bound is what the conditions of Karush, Kuhn and Tucker leave open: for convex f, f(w) is at most
    w·∇f(w) − min ∇f(w) above the minimum, and that is 0 at the optimum.

    Args:
        oracle: returns f, its gradient and its Hessian.
        size: how many weights.
        tolerance: of the bound; μ goes down until it is reached.

    Source:
        Boyd, Vandenberghe, Convex Optimization, 2004, sections 5.5.3, 10.2 and 11.3.
    """
    weights = np.full(size, 1.0 / size)
    barrier = 1.0
    while barrier * size > tolerance / 4:
        barrier /= 10
        for _ in range(50):
            value, gradient, hessian = oracle(weights)
            slope = gradient - barrier / weights
            system = np.ones((size + 1, size + 1))
            system[:size, :size] = hessian + np.diag(barrier / weights**2)
            system[size, size] = 0.0
            step = np.asarray(np.linalg.solve(system, np.append(-slope, 0.0))[:size], np.float64)
            decrease = -float(slope @ step)
            if decrease < barrier * 1e-3:
                break
            here = value - barrier * np.log(weights).sum()
            length = min(1.0, 0.99 / max(1e-12, float(np.max(-step / weights))))
            while length > 1e-10:
                ahead = weights + length * step
                if oracle(ahead)[0] - barrier * np.log(ahead).sum() <= here - 0.1 * length * decrease:
                    break
                length /= 2
            weights = weights + length * step
            weights /= weights.sum()
    cleared = np.where(weights < _SMALL, 0.0, weights)
    cleared /= cleared.sum()
    gap, cleared_gap = _gap(oracle, weights), _gap(oracle, cleared)
    return (cleared, cleared_gap) if cleared_gap <= max(gap, tolerance) else (weights, gap)


def _gap(oracle: Oracle, weights: Floats) -> float:
    gradient = oracle(weights)[1]
    return float(weights @ gradient - gradient.min())
