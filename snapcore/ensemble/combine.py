"""How the predictions of members become one: probabilities are averaged, never weights or logits.

Members arrive one at a time and are gone again before the next: whatever their number, an average
costs one float64 array and one member. The walk goes from the last member to the first, because an
ensemble of the last m members is then what has been summed up so far.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from snapcore.errors import DataError
from snapcore.metrics import as_probabilities, score

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
) -> npt.NDArray[Any]:
    """Average the members' probabilities.

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
    mean = _Mean("combine")
    if last is None and weights is None and not isinstance(probabilities, MemberSequence):
        for position, member in enumerate(probabilities):
            mean.add(member, position)
        return mean.value()
    members = _fetchable(probabilities, last)
    m = _check_last(len(members), last)
    for back, weight in enumerate(_relative(weights, m)[::-1], start=1):
        mean.add(members[len(members) - back], -back, float(weight))
    return mean.value()


def prefix_curve(
    probabilities: MemberSequence | Iterable[npt.ArrayLike], labels: npt.ArrayLike
) -> list[dict[str, float]]:
    """Score the ensembles of the last 1, 2, … M members, in one pass over the members.

    Row m is `score(combine(probabilities, last=m), labels)`, but each member is fetched exactly once,
    from the last to the first, so all M ensembles cost M forward passes.

    Args:
        probabilities: [members, examples, classes], or a sequence of members [examples, classes], or an
            iterable of them; each value finite and in 0..1. A sequence may load its members on demand: one
            at a time is held. An iterable is first read into a list, since its last member comes last.
        labels: [examples], integers in 0..classes−1.

    Returns:
        M rows `{"m", "error", "nll", "brier", "ece"}`, m = 1 … M; error in percent, nll in nats per example.

    Raises:
        DataError: no members, members of different shapes, values that are no probabilities, labels that
            do not fit.

    Example:
        >>> rows = prefix_curve([[[0.8, 0.2], [0.9, 0.1]], [[0.6, 0.4], [0.3, 0.7]]], [0, 1])
        >>> [(row["m"], row["error"]) for row in rows]
        [(1, 0.0), (2, 50.0)]

    Source:
        Huang, Li, Pleiss, Liu, Hopcroft, Weinberger, Snapshot Ensembles: Train 1, Get M for Free,
        ICLR 2017, section 3; the curve over m is what its section 4 plots.
    """
    members = _fetchable(probabilities, None)
    mean, rows = _Mean("prefix_curve"), []
    for m in range(1, _check_last(len(members), None) + 1):
        mean.add(members[len(members) - m], -m)
        rows.append({"m": m, **score(mean.value(), labels)})
    return rows


class _Mean:
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
        if self._total is None:
            raise DataError(_NO_MEMBERS)
        return np.asarray(self._total / self._weight, dtype=self._dtype)


def _fetchable(probabilities: MemberSequence | Iterable[npt.ArrayLike], last: int | None) -> MemberSequence:
    if last is not None and last < 1:
        raise DataError(f"last must be at least 1, got {last}; leave it out to use all members")
    if isinstance(probabilities, MemberSequence):
        return probabilities
    return deque(probabilities, maxlen=last)


def _check_last(n_members: int, last: int | None) -> int:
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
