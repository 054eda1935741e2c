"""Members' predictions, made once and kept: what all that is asked of an ensemble afterwards is computed from."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from snapcore.errors import CorruptSnapshotError, DataError, StoreError
from snapcore.metrics import ROUNDING
from snapcore.store import Tensors, map_tensors, read_metadata, write_tensor_file

KINDS = ("classes", "labels", "values", "gaussian")
"""What a model may predict; see `Predictions`."""

Floats = npt.NDArray[np.float64]

_FORMAT = "snapcore predictions 1"
_BLOCK = 2**15  # numbers of one member that are worked on at a time: they stay in a core's cache
_ROW = 1e-3  # how far from 1 the rows of honest float32 softmax may sum
_ROW_HALF = 2e-2


class _Facts(msgspec.Struct, forbid_unknown_fields=True):
    """What a file says of its predictions."""

    kind: str
    ignore: int | None
    split: str | None
    data: str | None
    members: tuple[str, ...] | None


class Predictions(Sequence[npt.NDArray[np.float32]]):
    """The predictions of each of M members for the same examples, with the examples' labels.

    A sequence of members, each [examples, …, classes] in float32. What takes it works on a block of examples at a time,
    so that an array that lies in a file, as `open` gives it, need not fit into memory.

    Args:
        log_probabilities: [members, examples, …, classes] where `kind` is classes: logarithms of probabilities, whose
            rows sum to 1. Where it is labels: of each label's own probability (sigmoid). Where it is values:
            [members, examples, …], the values themselves. Where it is gaussian: [members, examples, …, 2], mean and
            variance.
        labels: [examples, …] integers in 0..classes−1; for labels [examples, …, labels] of 0 and 1; otherwise the
            targets, [examples, …]. May be left out where only predictions are combined.
        kind: classes, labels, values or gaussian.
        ignore: the label of what does not count, such as −100 for padding; classes only.
        split: which part of the data it is, such as `"test"` or `"held-out"`.
        data: the SHA-256 of that part, or any other name of its content.
        members: the SHA-256 of each member's file.
        tolerance: how far from 1 the sum of a row may be; default 0.001, and 0.02 for half precision.

    Raises:
        DataError: shapes that do not fit, NaN, rows that do not sum to 1, labels that name no class.

    Example:
        >>> made = Predictions.from_probabilities([[[0.8, 0.2]], [[0.6, 0.4]]], [0])
        >>> len(made), made[1].shape, made.labels.tolist()
        (2, (1, 2), [0])
    """

    def __init__(
        self,
        log_probabilities: npt.ArrayLike,
        labels: npt.ArrayLike | None = None,
        *,
        kind: str = "classes",
        ignore: int | None = None,
        split: str | None = None,
        data: str | None = None,
        members: Sequence[str] | None = None,
        tolerance: float | None = None,
    ) -> None:
        if kind not in KINDS:
            raise DataError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if ignore is not None and kind != "classes":
            raise DataError(f"ignore is for classes alone, got it with kind={kind!r}; leave those examples out")
        self.kind, self.split, self.data = kind, split, data
        self.ignore = None if ignore is None else int(ignore)
        self._array, half = _as_members(log_probabilities, kind)
        self._check_members((_ROW_HALF if half else _ROW) if tolerance is None else tolerance)
        self.labels = None if labels is None else self._checked_labels(labels)
        self.members = None if members is None else tuple(members)
        if self.members is not None and len(self.members) != len(self):
            raise DataError(f"members must name each of the {len(self)} members, got {len(self.members)}")

    @classmethod
    def from_probabilities(
        cls, probabilities: npt.ArrayLike, labels: npt.ArrayLike | None = None, **options: Any
    ) -> Self:
        """Take probabilities instead of their logarithms; one that is 0 becomes −inf.

        Args:
            probabilities: [members, examples, …, classes], each in 0..1, in float32 or float64.
            labels: as for the class itself.
            **options: as for the class itself; `kind` is classes or labels.

        Raises:
            DataError: as for the class itself, or a value outside 0..1.
        """
        array, half = _as_members(probabilities, options.get("kind", "classes"), np.float64)
        if array.size and not (array.min() >= -ROUNDING and array.max() <= 1 + ROUNDING):
            raise DataError("probabilities must be finite and in 0..1; give outputs through softmax first")
        with np.errstate(divide="ignore"):
            logs = np.log(np.clip(array, 0.0, 1.0))
        return cls(logs, labels, **{"tolerance": _ROW_HALF if half else _ROW, **options})

    @staticmethod
    def is_kept_in(path: str | os.PathLike[str]) -> bool:
        """Return whether a file is one that `save` wrote, by what it says itself."""
        try:
            return read_metadata(Path(path)).get("format") == _FORMAT
        except StoreError:
            return False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open what `save` wrote. The predictions stay in the file, and are read when they are used.

        Raises:
            StoreError: there is no such file.
            CorruptSnapshotError: it is not what was written.
            DataError: its content does not fit together.
        """
        path = Path(path)
        metadata = read_metadata(path)
        if metadata.get("format") != _FORMAT:
            raise CorruptSnapshotError(f"{path} does not hold predictions: it says {metadata.get('format')!r}")
        tensors = map_tensors(path)
        if metadata.get("sha256") != _digest(tensors, metadata):
            raise CorruptSnapshotError(f"{path} is not what was written: its SHA-256 is another; make it anew")
        try:
            facts = msgspec.structs.asdict(msgspec.json.decode(metadata["facts"], type=_Facts))
            return cls(tensors["predictions"], tensors.get("labels"), **facts, tolerance=np.inf)
        except (KeyError, TypeError, msgspec.MsgspecError) as error:
            raise CorruptSnapshotError(f"{path} is not what was written: {error!r}; make it anew") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all into one safetensors file, whole or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        tensors = {"predictions": self._array} | ({} if self.labels is None else {"labels": self.labels})
        metadata = {"format": _FORMAT, "facts": msgspec.json.encode(_Facts(**self._facts())).decode()}
        write_tensor_file(Path(path), tensors, {**metadata, "sha256": _digest(tensors, metadata)})

    def _facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _Facts.__struct_fields__}

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        return self._array[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """[members, examples, …, classes], as given."""
        return self._array.shape

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return int(self._array.shape[1])

    @property
    def rows(self) -> int:
        """How many labels count: examples, times whatever axes they have, without those that are ignored."""
        if self.labels is None:
            raise DataError("labels are missing: give Predictions(…, labels)")
        return int(self.labels.size) if self.ignore is None else int(np.count_nonzero(self.labels != self.ignore))

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        """Yield slices of examples, and all members' predictions for them in float64, [members, block, …]."""
        step = max(1, _BLOCK // max(1, self._array[:1, :1].size))
        for start in range(0, self.examples, step):
            rows = slice(start, start + step)
            yield rows, self._array[:, rows].astype(np.float64)

    def log_likelihood(self) -> Floats:
        """Return the log-likelihood of every label that counts under each member, [members, rows].

        For labels a row is one label of one example; for gaussian the logarithm of a density, in 1 / the target's unit.

        Raises:
            DataError: labels are missing, or the members predict plain values, which have no likelihood.
        """
        if self.kind == "values":
            raise DataError("plain values have no likelihood: use kind='gaussian' for a mean and a variance")
        counted, filled = np.empty((len(self), self.rows)), 0
        for rows, block in self.blocks():
            found = likelihood(self.kind, block, self.labels_of(rows), self.ignore)
            counted[:, filled : filled + found.shape[1]] = found
            filled += found.shape[1]
        return counted

    def take(self, examples: npt.ArrayLike) -> "Predictions":
        """Return the predictions for some of the examples, by their positions, in memory."""
        chosen = np.asarray(examples)
        labels = None if self.labels is None else self.labels[chosen]
        return Predictions(self._array[:, chosen], labels, **self._facts(), tolerance=np.inf)

    def labels_of(self, rows: slice) -> npt.NDArray[Any]:
        """Return the labels of some examples.

        Raises:
            DataError: labels are missing.
        """
        if self.labels is None:
            raise DataError("labels are missing: give Predictions(…, labels)")
        return self.labels[rows]

    def _check_members(self, tolerance: float) -> None:
        for rows, block in self.blocks():
            for member, found in enumerate(block):
                wrong = _wrong(self.kind, found, tolerance)
                if wrong is not None:
                    where = [rows.start + int(wrong[1][0]), *map(int, wrong[1][1:])]
                    raise DataError(f"member [{member}] must {wrong[0]} at {where}")

    def _checked_labels(self, labels: npt.ArrayLike) -> npt.NDArray[Any]:
        array = np.asarray(labels)
        wanted = self.shape[1:-1] if self.kind in ("classes", "gaussian") else self.shape[1:]
        if array.shape != wanted:
            raise DataError(f"labels must have shape {wanted} for predictions {self.shape[1:]}, got {array.shape}")
        if self.kind in ("values", "gaussian"):
            if not (np.can_cast(array.dtype, np.float64, "same_kind") and np.isfinite(array).all()):
                raise DataError("labels must be finite real numbers; leave examples without a target out")
            return array.astype(np.float64)
        if self.kind == "labels":
            if not ((array == 0) | (array == 1)).all():
                raise DataError("labels must be 0 or 1 for each of an example's labels")
            return array.astype(np.int64)
        if not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"labels must be integers, got dtype {array.dtype}; give class numbers")
        classes = self.shape[-1]
        outside = (array < 0) | (array >= classes)
        if self.ignore is not None:
            outside &= array != self.ignore
            if (array == self.ignore).all():
                raise DataError(f"at least one label must count, got ignore={self.ignore} alone")
        if outside.any():
            position = np.argwhere(outside)[0]
            raise DataError(
                f"labels must be in 0..{classes - 1}, got {array[tuple(position)]} at {position.tolist()}; "
                "ignore= names a label that does not count"
            )
        return array.astype(np.int64)


def likelihood(kind: str, block: Floats, labels: npt.NDArray[Any], ignore: int | None) -> Floats:
    """Return the log-likelihood of labels, [members, rows], from predictions [members, examples, …]."""
    if kind == "gaussian":
        mean, variance = block[..., 0], block[..., 1]
        logs = -0.5 * (np.log(2 * np.pi * variance) + (labels - mean) ** 2 / variance)
    elif kind == "labels":
        logs = np.where(labels == 1, block, log1mexp(block))
    else:
        known = labels if ignore is None else np.where(labels == ignore, 0, labels)
        logs = np.take_along_axis(block, np.broadcast_to(known, block.shape[:-1])[..., None], -1)[..., 0]
        if ignore is not None:
            return np.asarray(logs[:, labels != ignore])
    return logs.reshape(len(block), -1)


def log1mexp(logs: Floats) -> Floats:
    """Return ln(1 − e^x) for x at most 0, without loss where e^x is near 0 or 1."""
    logs = np.minimum(logs, 0.0)
    with np.errstate(divide="ignore"):
        return np.where(logs > -0.6931, np.log(-np.expm1(logs)), np.log1p(-np.exp(logs)))


def _as_members(values: npt.ArrayLike, kind: str, dtype: Any = np.float32) -> tuple[npt.NDArray[Any], bool]:
    """Return all members as one array, and whether they came in half precision."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(f"members must have one shape: {error}; predict the same examples with each") from error
    fewest = 2 if kind == "values" else 3
    if array.ndim < fewest:
        wanted = {"values": "[members, examples]", "gaussian": "[members, examples, 2]"}
        raise DataError(
            f"predictions must be {wanted.get(kind, '[members, examples, classes]')} or have more axes after the "
            f"examples, got shape {array.shape}"
        )
    if not array.size:
        raise DataError(f"at least one member and one example are required, got shape {array.shape}")
    if kind == "gaussian" and array.shape[-1] != 2:
        raise DataError(f"gaussian predictions must end in an axis of 2, mean and variance, got shape {array.shape}")
    half = array.dtype.name in ("float16", "bfloat16")
    if not (half or np.can_cast(array.dtype, np.float64, "same_kind")):
        raise DataError(f"predictions must be real numbers, got dtype {array.dtype}")
    # Kept as it is where it is float32: it may lie in a file.
    return array.astype(dtype, copy=False), half


def _wrong(kind: str, found: Floats, tolerance: float) -> tuple[str, npt.NDArray[np.intp]] | None:
    """Return what one member's predictions must be and are not, and where."""
    if kind in ("classes", "labels"):
        if not found.max() <= ROUNDING:
            position = np.argwhere(~(found <= ROUNDING))[0]
            return f"hold log-probabilities, at most 0 and not NaN, got {found[tuple(position)]:g}", position
        if kind == "classes":
            off = np.abs(np.exp(found).sum(axis=-1) - 1)
            if not off.max() <= tolerance:
                position = np.argwhere(~(off <= tolerance))[0]
                return f"hold rows of log_softmax, which sum to 1: off by {off[tuple(position)]:.2g}", position
        return None
    if not np.isfinite(found).all():
        position = np.argwhere(~np.isfinite(found))[0]
        return f"hold finite values, got {found[tuple(position)]}", position
    if kind == "gaussian" and not found[..., 1].min() > 0:
        return "hold variances above 0 (exp of a log-variance), got less", np.argwhere(~(found[..., 1] > 0))[0]
    return None


def _digest(tensors: Tensors, metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(metadata.get("facts", "").encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
