"""Whether a difference between two methods is more than chance: paired by seed, with an interval that can be trusted.

Scores are such that less is better: an NLL, an error. Nothing here knows where they come from. It needs SciPy.

Which interval to trust with few seeds was settled by simulation (`make statistics`): the sign-flip test, inverted. Its
endpoints are quantiles of the means of all subsets of the differences (Hartigan, Using Subsample Values as Typical
Values, JASA 1969). With six seeds it covers 95 % of normal and of heavy-tailed differences, where BCa covers 80 to 89.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError

try:
    from scipy import stats
except ModuleNotFoundError as error:
    if error.name != "scipy":
        raise
    raise ModuleNotFoundError("snapcore.verdict needs SciPy: pip install 'snapcore[lab]'", name="scipy") from error

Verdict = Literal["better", "worse", "undecided"]

FEWEST = 6
"""Pairs under which no verdict is given: with five, two-sided sign flips cannot give a p below 0.0625."""

_LEVEL = 0.05
_EXACT = 13  # pairs up to which all sign flips are counted: 8,192
_SAMPLED = 2**_EXACT - 1  # of more pairs, so many are drawn
_BLOCKS = 32  # they are drawn in, so that thousands of pairs need little memory
_POWER = 0.8
_RESAMPLES = 1999
_MANY = 20_000  # examples above which BCa, whose jackknife is quadratic, takes seconds

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """What paired scores of two methods, a and b, say; less is better.

    Attributes:
        difference: mean of a − b, in the scores' unit; below 0 where a is better.
        low: lower end of its 95 % interval.
        high: upper end.
        p: two-sided: how often chance alone gives a difference as large. Of the sign-flip test, all flips counted up to
            13 pairs and 8,191 drawn above; of examples the normal one. The verdict goes by it. With six pairs it takes
            steps of 0.03, between which the ends of the interval are interpolated: at 0.06 it may leave 0 out.
        pairs: how many there are.
        detectable: the smallest difference that so many pairs would show four times in five, given how they spread.
        verdict: `"better"` or `"worse"` (a than b, at 5 %), `"undecided"`, or None with fewer than six pairs.
    """

    difference: float
    low: float
    high: float
    p: float
    pairs: int
    detectable: float
    verdict: Verdict | None


def compare_paired(a: npt.ArrayLike, b: npt.ArrayLike) -> Comparison:
    """Compare the scores of two methods, paired by seed.

    With fewer than six pairs the interval is Student's, and there is no verdict.

    Arguments:
        a: [seeds] scores of one method, such as its calibrated NLL on the test set; less is better.
        b: [seeds] those of the other, of the same seeds in the same order.

    Raises:
        DataError: scores of different numbers of seeds, fewer than two, or one that is not finite (which is named).

    Example:
        >>> found = compare_paired([0.29, 0.31, 0.30, 0.28, 0.32, 0.29], [0.33, 0.34, 0.31, 0.33, 0.35, 0.33])
        >>> found.verdict, round(found.difference, 3), round(found.p, 3)
        ('better', -0.033, 0.031)
    """
    differences = _differences(a, b, "pairs")
    n, mean = len(differences), float(differences.mean())
    spread = float(differences.std(ddof=1))
    low, high = _students(differences) if n < FEWEST else _typical(differences)
    p = _sign_flip(differences)
    return Comparison(mean, low, high, p, n, _detectable(spread, n), _verdict(mean, p) if n >= FEWEST else None)


def compare_examples(a: npt.ArrayLike, b: npt.ArrayLike, *, seed: int = 0) -> Comparison:
    """Compare two ensembles that are what they are, by their scores on the same examples.

    The interval is BCa's, over examples, and Student's above 20,000, where the two agree: how another test set of the
    same kind might have come out. It says nothing of other trainings of the same methods.

    Arguments:
        a: [examples] losses of one ensemble, such as each example's NLL; less is better.
        b: [examples] those of the other.
        seed: of the resampling.

    Raises:
        DataError: different numbers of examples, fewer than 100, or a score that is not finite.
    """
    differences = _differences(a, b, "examples")
    n, mean = len(differences), float(differences.mean())
    if n < 100:
        raise DataError(f"an interval over examples needs 100 or more, got {n}: compare several seeds instead")
    spread = float(differences.std(ddof=1))
    if spread == 0.0:  # BCa is not defined
        return Comparison(mean, mean, mean, 1.0 if mean == 0.0 else 0.0, n, 0.0, _verdict(mean, float(mean == 0.0)))
    low, high = _students(differences) if n > _MANY else _bca(differences, seed)
    p = float(2 * stats.norm.sf(abs(mean) / (spread / math.sqrt(n))))
    return Comparison(mean, low, high, p, n, _detectable(spread, n), _verdict(mean, p))


def ensemble_equivalent(score: float, independent: Sequence[float]) -> float:
    """Return how many independent networks together score as well.

    Arguments:
        score: of the ensemble in question, such as its calibrated NLL; less is better.
        independent: scores of ensembles of 1, 2, … K independently trained networks.

    Returns:
        A number in 1..K, interpolated between two sizes; 1 if a single network is as good; infinity if all K are not.

    Raises:
        DataError: no scores, or one that is not finite.

    Example:
        >>> ensemble_equivalent(0.295, [0.32, 0.30, 0.29])
        2.5

    Source: Ashukha, Lyzhov, Molchanov, Vetrov, Pitfalls of In-Domain Uncertainty Estimation and Ensembling in Deep
    Learning, ICLR 2020, section 4.2 (the deep ensemble equivalent).
    """
    curve = np.asarray(independent, np.float64)
    if curve.ndim != 1 or not curve.size:
        raise DataError(f"independent must be scores of 1, 2, … networks, got shape {curve.shape}")
    if not (np.isfinite(curve).all() and math.isfinite(score)):
        raise DataError(f"scores must be finite, got {score} and {curve.tolist()}: leave out what has failed")
    reached = np.flatnonzero(curve <= score)
    if not reached.size:
        return math.inf
    first = int(reached[0])
    if first == 0:
        return 1.0
    before, after = float(curve[first - 1]), float(curve[first])
    return first + (before - score) / (before - after)


def in_words(
    comparison: Comparison, a: str, b: str, *, score: str = "calibrated NLL", unit: str = "nats", least: float = 0.0
) -> str:
    """Return the verdict as a sentence: worth it, not worth it here, or not decided and what it would take.

    Arguments:
        comparison: of a with b.
        a: what is in question, as it is to be called.
        b: what it is compared with.
        score: the name of the scores, of which less is better.
        unit: theirs.
        least: the gain under which a is not worth it, 0 or more, in that unit. Where even the better end of the
            interval gains less, the sentence says no.

    Example:
        >>> found = compare_paired([0.29] * 6, [0.32, 0.33, 0.34, 0.31, 0.32, 0.33])
        >>> in_words(found, "snapshot", "cosine").partition(" (")[0]
        'Worth it here: snapshot has 0.0350 nats less calibrated NLL than cosine'
    """
    found, gain = comparison, -comparison.difference
    low, high = -found.high, -found.low
    size = f"{abs(gain):.4f} {unit}".rstrip()
    measured = (
        f"{a} has {size} {'less' if gain >= 0 else 'more'} {score} than {b} "
        f"(95 % interval {low:.4f} to {high:.4f}, p = {found.p:.3f}, {found.pairs} pairs)"
    )
    if found.verdict == "better" and gain >= least:
        return f"Worth it here: {measured}."
    if found.verdict == "worse" or (found.verdict is not None and least > 0.0 and high < least):
        return f"Not worth it here: {measured}."
    if found.verdict is None:
        return f"Not decided: {measured}; fewer than {FEWEST} seeds decide nothing, so train {FEWEST}."
    if found.verdict == "better":
        return (
            f"Not decided: {measured}; it is there, but {least:g} is asked for, which the interval does not rule out."
        )
    needed = pairs_needed(found)
    more = f"about {needed} seeds would show a difference of this size" if needed else "there is no difference to show"
    return f"Not decided: {measured}; {more}, and {found.pairs} show one of {found.detectable:.4f} four times in five."


def pairs_needed(comparison: Comparison) -> int | None:
    """Return how many pairs would show the difference found four times in five, more than these; None if it is 0."""
    if comparison.difference == 0.0:
        return None
    ratio = comparison.detectable / abs(comparison.difference)
    return max(FEWEST, comparison.pairs + 1, math.ceil(comparison.pairs * ratio * ratio))


def _differences(a: npt.ArrayLike, b: npt.ArrayLike, what: str) -> Floats:
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise DataError(f"scores must be two rows of the same {what}, got shapes {first.shape} and {second.shape}")
    if len(first) < 2:
        raise DataError(f"a comparison needs two or more {what}, got {len(first)}")
    for name, scores in (("a", first), ("b", second)):
        wrong = np.flatnonzero(~np.isfinite(scores))
        if wrong.size:
            raise DataError(
                f"scores must be finite, got {scores[wrong[0]]} in {name} at position {wrong[0]}: leave that pair out "
                "of both, and say so"
            )
    return first - second


def _verdict(mean: float, p: float) -> Verdict:
    if p > _LEVEL:
        return "undecided"
    return "better" if mean < 0 else "worse"


def _sign_flip(differences: Floats) -> float:
    exact = len(differences) <= _EXACT
    found = stats.permutation_test(
        (differences,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf if exact else _SAMPLED,
        vectorized=True,
        random_state=np.random.default_rng(0),
    )
    return float(found.pvalue)


def _typical(differences: Floats) -> tuple[float, float]:
    """Return the 95 % interval of the inverted sign-flip test.

    The mean is equally likely to lie in each gap between the sorted means of all subsets. Where no whole number of gaps
    leaves out 5 %, as with six pairs, the ends are interpolated.
    """
    means = np.sort(
        np.concatenate([chosen @ differences / chosen.sum(axis=1) for chosen in _subsets(len(differences))])
    )
    position = _LEVEL / 2 * (len(means) + 1) - 1
    ends = np.interp([position, len(means) - 1 - position], np.arange(len(means)), means)
    return float(ends[0]), float(ends[1])


def _subsets(n: int) -> Iterator[Floats]:
    """Yield which of `n` are in a subset, [subsets, n] of 0 and 1: all that are not empty, or many drawn at random."""
    if n <= _EXACT:
        yield ((np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)
        return
    draws = np.random.default_rng(0)
    for _ in range(_BLOCKS):
        chosen = draws.integers(0, 2, (2**_EXACT // _BLOCKS, n)).astype(np.float64)
        yield chosen[chosen.any(axis=1)]


def _bca(differences: Floats, seed: int) -> tuple[float, float]:
    draws = np.random.default_rng(seed)
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=_RESAMPLES, batch=50, method="BCa", random_state=draws, vectorized=True
    ).confidence_interval
    return float(found.low), float(found.high)


def _students(differences: Floats) -> tuple[float, float]:
    n = len(differences)
    half = float(stats.t.ppf(1 - _LEVEL / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    mean = float(differences.mean())
    return mean - half, mean + half


def _detectable(spread: float, n: int) -> float:
    return float((stats.t.ppf(1 - _LEVEL / 2, n - 1) + stats.t.ppf(_POWER, n - 1)) * spread / math.sqrt(n))
