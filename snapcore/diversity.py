"""How much members differ: in what they predict, in what they get wrong, and in their weights.

`p` is [members, examples, classes] in probabilities, or `Predictions`. It is read a block of examples at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from snapcore.ensemble import Predictions
from snapcore.errors import DataError
from snapcore.metrics import as_probabilities

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Members = Predictions | npt.ArrayLike


def correlation(p: Members) -> Floats:
    """Give the correlation of each pair of members' softmax outputs, [members, members].

    Pearson's, over all examples and classes as one long vector. The paper's figure 6 says "pairwise correlation of
    softmax outputs" and no more; this is what it is commonly read as. All rows sum to 1, so even members that know
    nothing of each other correlate, if both are good.

    Raises:
        DataError: fewer axes, values that are no probabilities, or outputs of a member that are all the same.

    Example:
        >>> correlation([[[0.9, 0.1], [0.2, 0.8]], [[0.1, 0.9], [0.8, 0.2]]]).round(6).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]

    Source:
        Huang, Li, Pleiss, Liu, Hopcroft, Weinberger, Snapshot Ensembles, ICLR 2017, section 4.4 and figure 6.
    """
    total, count, lowest, highest = 0.0, 0, np.inf, -np.inf
    for rows in _flat(p):
        total, count = total + rows.sum(axis=1), count + rows.shape[1]
        lowest, highest = np.minimum(lowest, rows.min(axis=1)), np.maximum(highest, rows.max(axis=1))
    constant = np.flatnonzero(lowest == highest)
    if constant.size:
        raise DataError(f"member [{constant[0]}] gives the same output everywhere, and has no correlation")
    mean = np.reshape(total / count, (-1, 1))
    products = sum((rows - mean) @ (rows - mean).T for rows in _flat(p))
    lengths = np.sqrt(np.diagonal(products))
    found: Floats = np.clip(products / np.outer(lengths, lengths), -1.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found


def disagreement(p: Members) -> Floats:
    """Give the share of examples for which each pair of members decides for different classes, [members, members].

    Raises:
        DataError: fewer axes, or values that are no probabilities.

    Example:
        >>> disagreement([[[0.9, 0.1], [0.2, 0.8]], [[0.8, 0.2], [0.7, 0.3]]]).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    apart: Floats | float = 0.0
    count = 0
    for block in _blocks(p):
        decided = block.argmax(axis=-1).reshape(len(block), -1)
        apart = apart + np.array([np.count_nonzero(decided != each, axis=1) for each in decided])
        count += decided.shape[1]
    return np.asarray(apart / count)


def double_fault(p: Members, labels: npt.ArrayLike | None = None) -> Floats:
    """Give the share of examples that both of a pair of members get wrong, [members, members].

    The diagonal holds each member's own error, in 0..1.

    Args:
        p: members.
        labels: [examples], class numbers; `Predictions` may have them.

    Raises:
        DataError: as for `disagreement`, or labels that are missing or do not fit.

    Example:
        >>> double_fault([[[0.9, 0.1], [0.2, 0.8]], [[0.8, 0.2], [0.7, 0.3]]], [1, 1]).tolist()
        [[0.5, 0.5], [0.5, 1.0]]

    Source:
        Giacinto, Roli, Design of effective neural network ensembles for image classification purposes, 2001.
    """
    both, count = 0.0, 0
    for block, _, known in _labelled(p, labels):
        wrong = (block.argmax(axis=-1) != known).astype(np.float64)
        both, count = both + wrong @ wrong.T, count + len(known)
    return np.asarray(both / count)


def ambiguity(p: Members, labels: npt.ArrayLike | None = None, score: str = "nll") -> tuple[float, float, float]:
    """Split what an ensemble of equal members loses: its loss is the members' mean loss, less their diversity.

    For `"brier"`, sum_c (p_c − [c = y])², the diversity is the members' mean squared distance from their mean, and for
    `"nll"`, −ln p_y, it is the mean of ln(p̄_y / p_y), Jensen's gap. Neither is below 0.

    Args:
        p: members.
        labels: [examples], class numbers; `Predictions` may have them.
        score: nll or brier.

    Returns:
        (mean_member, diversity, ensemble), with ensemble = mean_member − diversity; per example.

    Raises:
        DataError: as for `double_fault`, another score, or a label of probability 0 under a member, for nll.

    Example:
        >>> mean, diversity, ensemble = ambiguity([[[0.8, 0.2]], [[0.2, 0.8]]], [0], "brier")
        >>> round(mean, 6), round(diversity, 6), round(ensemble, 6)
        (0.68, 0.18, 0.5)

    Source:
        Krogh, Vedelsby, Neural network ensembles, cross validation, and active learning, NeurIPS 1994; Wood, Mu, Webb,
        Reeve, Luján, Brown, A unified theory of diversity in ensemble learning, JMLR 2023.
    """
    if score not in ("nll", "brier"):
        raise DataError(f"score must be 'nll' or 'brier', got {score!r}")
    sums, count = np.zeros(3), 0
    for block, logs, known in _labelled(p, labels):
        sums += _brier_parts(block, known) if score == "brier" else _nll_parts(logs)
        count += len(known)
    member, diversity, ensemble = (sums / count).tolist()
    return member, diversity, ensemble


def weight_distance(members: Sequence[Mapping[str, Any]]) -> Floats:
    """Give the Euclidean distance of each pair of members' weights, [members, members].

    Args:
        members: named arrays, such as `SnapshotStore.load` returns; only floating-point ones count.

    Raises:
        DataError: members whose names or shapes differ.

    Example:
        >>> weight_distance([{"w": np.zeros(4)}, {"w": np.ones(4)}]).tolist()
        [[0.0, 2.0], [2.0, 0.0]]
    """
    vectors = [{name: np.asarray(value) for name, value in each.items()} for each in members]
    for index, each in enumerate(vectors):
        if {n: v.shape for n, v in each.items()} != {n: v.shape for n, v in vectors[0].items()}:
            raise DataError(f"members must have the same tensors: [{index}] has others than [0]")
    found = np.zeros((len(vectors), len(vectors)))
    for i, one in enumerate(vectors):
        for j in range(i):
            squares = (
                float(np.sum((one[name].astype(np.float64) - vectors[j][name].astype(np.float64)) ** 2))
                for name in one
                if not np.issubdtype(one[name].dtype, np.integer) and one[name].dtype != bool
            )
            found[i, j] = found[j, i] = np.sqrt(sum(squares))
    return found


def _brier_parts(block: Floats, known: Integers) -> Floats:
    """Return sums over a block's rows: of the members' mean loss, their diversity, and the ensemble's loss."""
    mean = block.mean(axis=0)
    target = np.zeros_like(mean)
    target[np.arange(len(known)), known] = 1.0
    member, diversity = (float(((block - each) ** 2).sum()) / len(block) for each in (target, mean))
    return np.array([member, diversity, ((mean - target) ** 2).sum()])


def _nll_parts(logs: Floats) -> Floats:
    """Return the same from log-likelihoods, [members, rows]."""
    if not np.isfinite(logs).all():
        raise DataError("a label has probability 0 under a member, whose loss is infinite: use score='brier'")
    pooled = np.logaddexp.reduce(logs, axis=0) - np.log(len(logs))
    return np.array([-logs.sum() / len(logs), (pooled - logs).sum() / len(logs), -pooled.sum()])


def _blocks(p: Members) -> Iterator[Floats]:
    """Yield probabilities, [members, block, …, classes]."""
    if isinstance(p, Predictions):
        _check_kind(p)
        for rows, logs in p.blocks():
            ignored = p.labels is not None and p.ignore is not None
            yield np.exp(logs[:, p.labels_of(rows) != p.ignore] if ignored else logs)
        return
    array = _checked(p)
    for rows in _slices(array):
        yield array[:, rows].astype(np.float64)


def _flat(p: Members) -> Iterator[Floats]:
    """Yield the same, [members, outputs]."""
    return (block.reshape(len(block), -1) for block in _blocks(p) if block.size)


def _labelled(p: Members, labels: npt.ArrayLike | None) -> Iterator[tuple[Floats, Floats, Integers]]:
    """Yield probabilities [members, rows, classes], log-likelihoods [members, rows] and labels [rows] that count."""
    if isinstance(p, Predictions):
        _check_kind(p)
        # Labels that are given count instead of the predictions' own.
        named = p if labels is None else Predictions(p[:], labels, ignore=p.ignore, tolerance=np.inf)
        parts = ((rows, np.exp(logs), logs) for rows, logs in p.blocks())
    else:
        array = _checked(p)
        named = Predictions(_log(array[:1].astype(np.float64)), labels, tolerance=np.inf)
        blocks = ((rows, array[:, rows].astype(np.float64)) for rows in _slices(array))
        parts = ((rows, block, _log(block)) for rows, block in blocks)
    if named.labels is None:
        raise DataError("labels are missing: pass [examples] class numbers")
    for rows, block, logs in parts:
        known = named.labels_of(rows)
        counts = np.ones(known.shape, bool) if named.ignore is None else known != named.ignore
        known = known[counts]
        yield block[:, counts], np.take_along_axis(logs[:, counts], known[None, :, None], -1)[..., 0], known


def _check_kind(p: Predictions) -> None:
    if p.kind != "classes":
        raise DataError(f"diversity is of classes, got predictions of kind {p.kind!r}")


def _checked(p: npt.ArrayLike) -> npt.NDArray[Any]:
    array = as_probabilities(p, "members")
    if array.ndim < 3 or not array.size:
        raise DataError(f"members must be [members, examples, classes], got shape {array.shape}")
    return array


def _slices(array: npt.NDArray[Any]) -> Iterator[slice]:
    """Yield slices of examples, of as many numbers of one member as stay in a core's cache."""
    step = max(1, 2**15 // array[0, 0].size)
    return (slice(start, start + step) for start in range(0, array.shape[1], step))


def _log(values: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(values)
