"""How the predictions of members become one: probabilities are averaged, never weights or logits.

Members arrive one at a time and are gone again before the next: whatever their number, an average costs one float64
array and one member, and two arrays in log space. The walk goes from the last member to the first, because an ensemble
of the last m members is then what has been summed up so far.

In log space the mean is ln mean e^l, with the largest logarithm so far taken out of the sum: nothing underflows.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from snapcore.ensemble.predictions import Floats, Predictions
from snapcore.errors import DataError
from snapcore.metrics import as_log_probabilities, as_probabilities

_LOWEST = -1e300  # stands for ln 0 in sums, since −inf − (−inf) is no number
_NO_MEMBERS = "at least one member is required, got none; was the iterator used up before?"


@runtime_checkable
class MemberSequence(Protocol):
    """Members that can be counted and fetched: a list, an array, or something that loads on demand."""

    def __len__(self) -> int:
        """Give the number of members."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Give member `index`, in 0..len−1, as an array of probabilities."""
        ...


def combine(
    probabilities: MemberSequence | Iterable[npt.ArrayLike],
    *,
    last: int | None = None,
    weights: npt.ArrayLike | None = None,
    log: bool = False,
) -> npt.NDArray[Any]:
    """Average the members' probabilities, or their logarithms' probabilities in log space.

    h = 1/m · sum_{i=0}^{m−1} h_{M−i}, with h_1 … h_M the members in `probabilities` and m = `last`; with
    `weights` w, sum_i w_i h_i / sum_i w_i over the same members. One float64 array holds the sum.

    Args:
        probabilities: [members, examples, classes], or a sequence of members, or an iterable of them.
            Members may have any shape, the same for all; each value finite and in 0..1. Of a sequence
            (anything with a length and an index) only the last m are fetched, each once, one at a time.
            An iterable is read to its end: streamed when neither `last` nor `weights` is given, else
            with the last m members (all, without `last`) kept, uncopied, until its end.
        last: m, how many members to use, in 1..M; all by default.
        weights: one number per member used, in the members' order; finite, not negative, not all 0. Only
            their ratios count. Equal by default.
        log: whether the members are log-probabilities, and log-probabilities are wanted: ln(sum_i w_i e^l_i / sum_i
            w_i). `Predictions` say themselves what they hold, and need no `log`: of classes and labels the result is
            log-probabilities, of values the mean, and of gaussian members the mixture's mean and variance.

    Returns:
        The shape of one member, in the members' float dtype, but float32 for anything smaller.

    Raises:
        DataError: no members, members of different shapes, values that are no probabilities, `last` out of
            range, weights that do not fit.

    Example:
        >>> combine([[[0.8, 0.2]], [[0.6, 0.4]], [[0.5, 0.5]]], last=2)
        array([[0.55, 0.45]])

    Source:
        Huang, Li, Pleiss, Liu, Hopcroft, Weinberger, Snapshot Ensembles: Train 1, Get M for Free,
        ICLR 2017, section 3.
    """
    if isinstance(probabilities, Predictions):
        return _combine_predictions(probabilities, last, weights)
    mean = LogMean("combine") if log else Mean("combine")
    if last is None and weights is None and not isinstance(probabilities, MemberSequence):
        for position, member in enumerate(probabilities):
            mean.add(member, position)
        return mean.value()
    members = fetchable(probabilities, last)
    m = check_last(len(members), last)
    for back, weight in enumerate(_relative(weights, m)[::-1], start=1):
        mean.add(members[len(members) - back], -back, float(weight))
    return mean.value()


class Mean:
    """The weighted mean of arrays that come one at a time: their sum and what it weighs."""

    def __init__(self, caller: str) -> None:
        self._caller = caller
        self._total: npt.NDArray[np.float64] | None = None
        self._weight = 0.0
        self._dtype: np.dtype[Any] = np.dtype(np.float32)

    def add(self, member: npt.ArrayLike, position: int, weight: float = 1.0) -> None:
        """Count one more member in; `position` is its index, for messages."""
        array = as_probabilities(member, f"{self._caller} averages probabilities; member [{position}]")
        if self._total is None:
            self._total = np.zeros(array.shape)
        if array.shape != self._total.shape:
            raise DataError(
                f"members must have one shape, got {array.shape} for member [{position}] and "
                f"{self._total.shape} before it; predict the same examples with every member"
            )
        # a second float64 array only where weights ask for it
        scaled = array if weight == 1.0 else np.multiply(array, weight, dtype=np.float64)
        np.add(self._total, scaled, out=self._total, dtype=np.float64)
        self._weight += weight
        self._dtype = np.result_type(self._dtype, array.dtype)

    def value(self) -> npt.NDArray[Any]:
        """Return the mean of what has been added."""
        if self._total is None:
            raise DataError(_NO_MEMBERS)
        return np.asarray(self._total / self._weight, dtype=self._dtype)


class LogMean(Mean):
    """The same of logarithms: the sum of e^(l − top), with the largest of each place as `top`."""

    _top: npt.NDArray[np.float64]

    def add(self, member: npt.ArrayLike, position: int, weight: float = 1.0) -> None:
        """Count one more member in; `position` is its index, for messages."""
        array = as_log_probabilities(member, f"{self._caller} averages log-probabilities; member [{position}]")
        logs = np.maximum(array.astype(np.float64), _LOWEST)
        if self._total is None:
            self._total, self._top = np.zeros(array.shape), np.full(array.shape, _LOWEST)
        if array.shape != self._total.shape:
            raise DataError(
                f"members must have one shape, got {array.shape} for member [{position}] and "
                f"{self._total.shape} before it; predict the same examples with every member"
            )
        if weight:
            rise = logs - self._top
            scale = np.exp(-np.abs(rise))
            self._total = np.where(rise > 0, self._total * scale + weight, self._total + weight * scale)
            np.maximum(self._top, logs, out=self._top)
        self._weight += weight
        self._dtype = np.result_type(self._dtype, array.dtype)

    def keep(self, rows: npt.NDArray[np.bool_]) -> None:
        """Forget the other examples."""
        if self._total is not None:
            self._total, self._top = self._total[rows], self._top[rows]

    def value(self) -> npt.NDArray[Any]:
        """Return the logarithm of the mean of what has been added."""
        if self._total is None:
            raise DataError(_NO_MEMBERS)
        with np.errstate(divide="ignore"):
            logs = self._top + np.log(self._total / self._weight)
        return np.asarray(np.where(self._top > _LOWEST, logs, -np.inf), dtype=self._dtype)


def _combine_predictions(
    predictions: Predictions, last: int | None, weights: npt.ArrayLike | None
) -> npt.NDArray[np.float32]:
    members = fetchable(predictions, last)
    m = check_last(len(members), last)
    shares = np.zeros(len(predictions))
    shares[len(predictions) - m :] = _relative(weights, m)
    result = np.empty(predictions.shape[1:], np.float32)
    for rows, block in predictions.blocks():
        result[rows] = pool(predictions.kind, block, shares)
    return result


def pool(kind: str, block: Floats, shares: Floats) -> Floats:
    """Return what members predict together.

    Args:
        kind: of predictions; see `Predictions`.
        block: [members, examples, …].
        shares: one weight per member, not negative.
    """
    used = np.flatnonzero(shares)
    parts = shares[used] / shares[used].sum()
    if kind in ("classes", "labels"):
        logs = np.maximum(block[used], _LOWEST)
        top = logs.max(axis=0)
        np.exp(np.subtract(logs, top, out=logs), out=logs)
        total = np.tensordot(parts, logs, 1)
        return np.where(top > _LOWEST, top + np.log(total, out=total), -np.inf)
    average: Floats = np.asarray(np.tensordot(parts, block[used], 1), np.float64)
    if kind == "gaussian":  # the variance of the mixture: within the members, and between them
        average[..., 1] += np.tensordot(parts, (block[used, ..., 0] - average[..., 0]) ** 2, 1)
    return average


def fetchable(probabilities: MemberSequence | Iterable[npt.ArrayLike], last: int | None) -> MemberSequence:
    """Return the members as a sequence; of an iterable the last `last` are kept."""
    if last is not None and last < 1:
        raise DataError(f"last must be at least 1, got {last}; leave it out to use all members")
    if isinstance(probabilities, MemberSequence):
        return probabilities
    return deque(probabilities, maxlen=last)


def check_last(n_members: int, last: int | None) -> int:
    """Return how many members are used, or raise `DataError`."""
    if not n_members:
        raise DataError(_NO_MEMBERS)
    if last is not None and last > n_members:
        raise DataError(f"last must be in 1..members={n_members}, got {last}; leave it out to use all members")
    return n_members if last is None else last


def _relative(weights: npt.ArrayLike | None, n_members: int) -> npt.NDArray[np.float64]:
    if weights is None:
        return np.ones(n_members)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (n_members,):
        raise DataError(
            f"weights must hold one number per member used ({n_members}), got shape {array.shape}; "
            "leave out those of members before the last m"
        )
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() > 0):
        raise DataError(f"weights must be finite, not negative and not all 0, got {array.tolist()}")
    relative: npt.NDArray[np.float64] = array / array.max()  # their sum can then neither overflow nor vanish
    return relative
