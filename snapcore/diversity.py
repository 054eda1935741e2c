"""How much members differ: in what they predict, in what they get wrong, and in their weights.

`p` is [members, examples, classes] in probabilities, or `Predictions`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from snapcore.ensemble import Predictions
from snapcore.errors import DataError
from snapcore.metrics import as_probabilities

Floats = npt.NDArray[np.float64]
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
    array = _probabilities(p)
    rows = array.reshape(len(array), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    lengths = np.sqrt(np.einsum("mk,mk->m", rows, rows))
    if not lengths.min() > 0:
        raise DataError(f"member [{int(lengths.argmin())}] gives the same output everywhere, and has no correlation")
    found: Floats = np.clip(rows @ rows.T / np.outer(lengths, lengths), -1.0, 1.0)
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
    decided = _probabilities(p).argmax(axis=-1)
    decided = decided.reshape(len(decided), -1)
    return np.array([(decided != each).mean(axis=1) for each in decided])


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
    array, known = _labelled(p, labels)
    wrong = (array.argmax(axis=-1) != known).astype(np.float64)
    return np.asarray(wrong @ wrong.T / wrong.shape[1])


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
    array, known = _labelled(p, labels)
    rows = np.arange(array.shape[1])
    if score == "brier":
        mean = array.mean(axis=0)
        target = np.zeros_like(mean)
        target[rows, known] = 1.0
        member = float(((array - target) ** 2).sum(axis=-1).mean())
        diversity = float(((array - mean) ** 2).sum(axis=-1).mean())
        return member, diversity, float(((mean - target) ** 2).sum(axis=-1).mean())
    logs = _log(array)[:, rows, known] if not isinstance(p, Predictions) else _named(p, labels).log_likelihood()
    if not np.isfinite(logs).all():
        raise DataError("a label has probability 0 under a member, whose loss is infinite: use score='brier'")
    pooled = np.logaddexp.reduce(logs, axis=0) - np.log(len(logs))
    return -float(logs.mean()), float((pooled - logs).mean()), -float(pooled.mean())


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


def _probabilities(p: Members) -> Floats:
    if isinstance(p, Predictions):
        if p.kind != "classes":
            raise DataError(f"diversity is of classes, got predictions of kind {p.kind!r}")
        return np.asarray(np.exp(p[:].astype(np.float64)))
    array = as_probabilities(p, "members")
    if array.ndim < 3 or not array.size:
        raise DataError(f"members must be [members, examples, classes], got shape {array.shape}")
    return array.astype(np.float64)


def _labelled(p: Members, labels: npt.ArrayLike | None) -> tuple[Floats, npt.NDArray[np.int64]]:
    array = _probabilities(p)
    if labels is None and (not isinstance(p, Predictions) or p.labels is None):
        raise DataError("labels are missing: pass [examples] class numbers")
    named = _named(p if isinstance(p, Predictions) else Predictions(_log(array[:1]), tolerance=np.inf), labels)
    known = named.labels_of(slice(None)).reshape(-1)
    array = array.reshape(len(array), -1, array.shape[-1])
    if isinstance(p, Predictions) and p.ignore is not None:
        array, known = array[:, known != p.ignore], known[known != p.ignore]
    return array, known


def _named(p: Predictions, labels: npt.ArrayLike | None) -> Predictions:
    """Return predictions with these labels instead of their own, where there are some."""
    return p if labels is None else Predictions(p[:], labels, ignore=p.ignore, tolerance=np.inf)


def _log(values: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(values)
