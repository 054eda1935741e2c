"""What is to be predicted, in one form for each kind of task; and which examples are kept back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from snapcore.data import LOSSES
from snapcore.errors import DataError
from snapcore.lab.datasets.images import are_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from snapcore.lab.datasets.arrays import Arrays


def loss_of(arrays: Arrays, loss: str | None, where: str) -> str:
    """Return the loss that is asked for, or that the data are for: what their reader, or their labels' type, says.

    Raises:
        DataError: no loss is called so, or integers could be classes or counts.
    """
    if loss is not None:
        if loss not in LOSSES:
            raise DataError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        return loss
    if arrays.loss is not None:
        return arrays.loss
    labels = arrays.y_train
    if not labels.size:
        raise DataError(f"{where}: labels must be there, got shape {list(labels.shape)}: complete it")
    if labels.dtype.kind == "f":
        return "squared-error"
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind in "biu" and not _are_of_tokens(arrays):
        if labels.min() >= 0 and labels.max() <= 1:
            if _is_one_hot(labels):
                raise DataError(
                    f"{where}: labels look one-hot, one 1 in each row: give class numbers, y.argmax(1), or pass --loss "
                    "binary-cross-entropy if they are several labels"
                )
            return "binary-cross-entropy"
        raise DataError(
            f"{where}: labels that are integers [n, labels] must be 0 or 1, got {labels.min()}..{labels.max()}: pass "
            "--loss cross-entropy for a class at every position, or squared-error for values"
        )
    if labels.ndim == 1 and labels.dtype.kind in "iu":
        _refuse_gaps(labels, arrays.y_test, where)
    return "cross-entropy"


def _refuse_gaps(labels: NDArray[Any], others: NDArray[Any], where: str) -> None:
    """Raise `DataError` for integers that leave numbers out below their largest: they may be counts."""
    known = np.union1d(labels, others) if others.dtype.kind in "iu" else np.unique(labels)
    largest = int(known[-1])
    if known[0] >= 0 and len(known) <= largest:
        raise DataError(
            f"{where}: class numbers must leave none of 0..{largest} out, got {len(known)} of them: pass --loss "
            "cross-entropy if they are classes, or squared-error if they are counts"
        )


def as_targets(arrays: Arrays, kind: str, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the targets of training and test: int64 class numbers or labels of 0 and 1, or float32 values.

    Raises:
        DataError: they are not of this kind, or not one for each example.
    """
    parts = ((arrays.x_train, arrays.y_train, "training"), (arrays.x_test, arrays.y_test, "test"))
    found: list[NDArray[Any]] = []
    for x, y, part in parts:
        what = f"{where}: {part}"
        labels = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        found.append(_CHECKS[kind](labels, arrays, what))
        if len(labels) != len(x):
            count = f"{len(x)} examples and {len(labels)} labels"
            raise DataError(f"{what} part must have one label per example, got {count}: complete it")
    if found[0].shape[1:] != found[1].shape[1:]:
        shapes = " and ".join(str(list(labels.shape)) for labels in found)
        raise DataError(f"{where}: training and test labels must have one shape, got {shapes}: convert them alike")
    return found[0], found[1]


def _classes(labels: NDArray[Any], arrays: Arrays, what: str) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu" or not labels.ndim:
        got = f"got {labels.dtype} {list(labels.shape)}"
        raise DataError(f"{what} labels must be integers [n] or [n, …], {got}: give one class number per position")
    if _is_one_hot(labels) and not _are_of_tokens(arrays):
        raise DataError(f"{what} labels look one-hot, one 1 in each row: give class numbers, y.argmax(1)")
    labels = labels.astype(np.int64)
    counted = labels if arrays.ignore is None else labels[labels != arrays.ignore]
    if counted.size and counted.min() < 0:
        cure = "number the classes from 0, and let the archive's ignore be the number of what does not count"
        raise DataError(f"{what} labels must be 0 or more, got {counted.min()}: {cure}")
    return labels


def _are_of_tokens(arrays: Arrays) -> bool:
    return are_tokens(arrays.x_train, arrays.y_train)


def _is_one_hot(labels: NDArray[Any]) -> bool:
    rows = labels.ndim == 2 and labels.shape[1] > 1 and bool(labels.size)
    return rows and labels.min() >= 0 and labels.max() <= 1 and bool((labels.sum(axis=1) == 1).all())


def _labels(labels: NDArray[Any], arrays: Arrays, what: str) -> NDArray[np.int64]:  # noqa: ARG001
    if labels.ndim != 2 or labels.dtype.kind not in "biuf" or not ((labels == 0) | (labels == 1)).all():
        got = f"got {labels.dtype} {list(labels.shape)}"
        raise DataError(f"{what} labels must be 0 or 1, [n, labels], {got}: give a column for each label")
    return labels.astype(np.int64)


def _values(labels: NDArray[Any], arrays: Arrays, what: str) -> NDArray[np.float32]:  # noqa: ARG001
    with np.errstate(over="ignore"):  # what is too large for float32 becomes inf, and is refused below
        values = labels.astype(np.float32) if labels.dtype.kind in "iuf" else np.array(np.nan, np.float32)
    if labels.ndim not in (1, 2) or not np.isfinite(values).all():
        got = f"got {labels.dtype} {list(labels.shape)}"
        raise DataError(f"{what} values must be finite numbers [n] or [n, values], {got}: repair them")
    return values


_CHECKS: dict[str, Callable[[NDArray[Any], Arrays, str], NDArray[Any]]] = {
    "classes": _classes,
    "labels": _labels,
    "values": _values,
    "gaussian": _values,
}


def count_outputs(kind: str, y_train: NDArray[Any], y_test: NDArray[Any], ignore: int | None) -> int:
    """Return how many classes, labels or values there are."""
    if kind != "classes":
        return 1 if y_train.ndim == 1 else int(y_train.shape[1])
    counted = [labels if ignore is None else labels[labels != ignore] for labels in (y_train, y_test)]
    return int(max(labels.max() for labels in counted)) + 1


def held_out_rows(labels: NDArray[Any], share: float, seed: int, where: str, *, stratified: bool) -> NDArray[np.bool_]:
    """Return which examples are kept back, [n].

    Args:
        labels: of the training part, [n, …].
        share: how many of them, at least 0 and below 1.
        seed: decides which.
        where: for messages.
        stratified: whether the same share of each class is kept back, or else of all.

    Raises:
        DataError: the share is none, or leaves nothing on one side.
    """
    if not 0 <= share < 1:
        raise DataError(f"held_out must be a share in 0..1, 1 excluded, got {share}: 0.1 is customary")
    kept_back = np.zeros(len(labels), bool)
    if stratified:
        for number in np.unique(labels):
            of_class = np.random.default_rng([seed, int(number)]).permutation(np.flatnonzero(labels == number))
            kept_back[of_class[: round(share * len(of_class))]] = True
    else:
        kept_back[np.random.default_rng([seed, 0]).permutation(len(labels))[: round(share * len(labels))]] = True
    if share and not kept_back.any():
        raise DataError(f"{where}: held_out={share} keeps none of {len(labels)} examples back: raise it")
    if kept_back.all():
        raise DataError(f"{where}: held_out={share} leaves no example to train on: lower it")
    return kept_back
