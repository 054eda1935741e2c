"""One model out of several: the mean of members' weights, where no barrier lies between them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError

Named = Mapping[str, npt.NDArray[Any]]
Score = Callable[[dict[str, npt.NDArray[Any]]], float]

LIMIT = 2.0
"""Percentage points of error: members with a higher barrier between them do not share a basin."""


class Interpolation(NamedTuple):
    """What `interpolation` returns.

    Attributes:
        shares: of the second member, 0 … 1.
        scores: of the weights in between, such as their error in percent.
        barrier: how far the worst of them is above the straight line from one end to the other, at least 0.
    """

    shares: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    barrier: float


def mean_weights(members: Sequence[Named], weights: npt.ArrayLike | None = None) -> dict[str, npt.NDArray[Any]]:
    """Return the mean of members' tensors, each in its own dtype; computed in float64.

    Integers and booleans, such as counts of batches, are those of the last member. Batch statistics are averaged like
    all else, and are not those of the averaged network: re-estimate them on training data before it is used.

    Args:
        members: named arrays, such as `SnapshotStore.load` returns, the same names and shapes in each.
        weights: one number per member, not negative; equal by default.

    Raises:
        DataError: there are no members, they have other names or shapes, or weights that do not fit.

    Example:
        >>> mean_weights([{"w": np.zeros(2)}, {"w": np.ones(2)}], [1, 3])["w"].tolist()
        [0.75, 0.75]
    """
    if not len(members):
        raise DataError("at least one member is required, got none")
    shares = np.ones(len(members)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(members),) or not (shares.min() >= 0 and 0 < shares.sum() < np.inf):
        raise DataError(f"weights must be {len(members)} numbers, not negative and not all 0, got {shares.tolist()}")
    shares = shares / shares.sum()
    for number, member in enumerate(members, 1):
        _check_same(members[0], member, number)
    mean = {}
    for name, last in members[-1].items():
        if last.dtype.kind in "biu":
            mean[name] = last.copy()
            continue
        total = np.zeros(last.shape, np.complex128 if last.dtype.kind == "c" else np.float64)
        for share, member in zip(shares, members, strict=True):
            total += share * member[name].astype(total.dtype)
        mean[name] = total.astype(last.dtype)
    return mean


def interpolation(one: Named, other: Named, score: Score, *, points: int = 25) -> Interpolation:
    """Score the weights on the straight line between two members: figure 5 of the paper.

    Args:
        one: named arrays.
        other: the same names and shapes.
        score: from named arrays to a number, lower being better, such as the error in percent of a network with these
            weights; where it has batch normalisation, with statistics that `score` re-estimates, or as they are.
        points: how many weights are scored, both ends among them; at least 3.

    Raises:
        DataError: the members differ in names or shapes, or `points` is below 3.

    Example:
        >>> found = interpolation({"w": np.zeros(1)}, {"w": np.ones(1)}, lambda w: float(w["w"][0] * (1 - w["w"][0])))
        >>> round(found.barrier, 6)
        0.25

    Source:
        Goodfellow, Vinyals, Saxe, Qualitatively characterizing neural network optimization problems, ICLR 2015.
    """
    if points < 3:
        raise DataError(f"points must be at least 3, got {points}")
    shares = np.linspace(0.0, 1.0, points)
    scores = np.array([score(mean_weights([one, other], [1 - share, share])) for share in shares])
    straight = (1 - shares) * scores[0] + shares * scores[-1]
    return Interpolation(shares, scores, max(0.0, float((scores - straight).max())))


def soup(
    members: Sequence[Named],
    error: Score,
    *,
    points: int = 5,
    limit: float = LIMIT,
    force: bool = False,
    names: Sequence[object] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Return the mean of members' weights, if they share a basin.

    Args:
        members: named arrays; the barrier is looked for between each and the last.
        error: from named arrays to an error in percent; see `interpolation`.
        points: how many weights are scored between two members, both ends among them.
        limit: the highest barrier in percentage points of error.
        force: whether to average whatever lies between them.
        names: what to call the members in a message, such as their indexes; by default 1, 2 …

    Raises:
        DataError: a barrier is higher than `limit`, or members do not fit together.

    Source:
        Wortsman et al., Model soups, ICML 2022; Frankle, Dziugaite, Roy, Carbin, Linear mode connectivity and the
        lottery ticket hypothesis, ICML 2020, whose instability is this barrier, and who count 2 points as stable.
    """
    called = range(1, len(members) + 1) if names is None else names
    for name, member in zip(called, members[:-1] if not force else (), strict=False):
        found = interpolation(member, members[-1], error, points=points)
        if found.barrier > limit:
            raise DataError(
                f"members {name} and {called[-1]} do not share a basin: a barrier of {found.barrier:.1f} points of "
                f"error lies between them, and at most {limit:g} is allowed; force=True or --force averages them anyway"
            )
    return mean_weights(members)


def _check_same(first: Named, member: Named, number: int) -> None:
    if member.keys() != first.keys():
        differing = sorted(member.keys() ^ first.keys())[0]
        raise DataError(f"member {number} must have the tensors of the first, and {differing!r} is in one alone")
    for name, array in member.items():
        if array.shape != first[name].shape:
            raise DataError(
                f"{name!r} must have one shape, got {array.shape} in member {number} and {first[name].shape} before"
            )
