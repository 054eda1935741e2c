"""Members' predictions, one member at a time, and the scores of every ensemble of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from snapcore.backend import Backend
from snapcore.errors import StoreError
from snapcore.metrics import score
from snapcore.store import Member, SnapshotStore

Probabilities = NDArray[np.float64]


class Predictions(Sequence[Probabilities]):
    """The class probabilities of one run's finished members, computed when asked for.

    Arguments:
        store: an opened run.
        backend: of the framework that trained it.
        state: of the same model; its weights are replaced.
        x: inputs, [examples, …].
        last: how many members, counted from the end; default all.

    Raises:
        StoreError: the run has fewer finished members than `last`, or none.
    """

    def __init__(
        self, store: SnapshotStore, backend: Backend[Any], state: Any, x: NDArray[Any], last: int | None = None
    ) -> None:
        finished = [member for member in store.members if not member.unfinished]
        if not finished:
            raise StoreError(f"{store.path} holds no finished member: train until the first cycle ends")
        count = len(finished) if last is None else last
        if not 1 <= count <= len(finished):
            raise StoreError(f"last must be in 1..{len(finished)}, the finished members of {store.path}; got {last}")
        self.members: list[Member] = finished[-count:]
        self._store, self._backend, self._state, self._x = store, backend, state, x

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: Any) -> Any:
        tensors = self._store.load(self.members[index].index)
        self._state = self._backend.restore(self._state, tensors, optimizer="keep")
        return probabilities(self._backend.logits(self._state, self._x))


class Scored(Sequence[Probabilities]):
    """Several runs' predictions, one after the other, each scored alone as it is passed on."""

    def __init__(self, runs: Sequence[Predictions], labels: NDArray[np.int64]) -> None:
        self.members = [member for run in runs for member in run.members]
        self.scores: dict[int, Mapping[str, float]] = {}
        self._positions = [(run, index) for run in runs for index in range(len(run))]
        self._labels = labels

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        run, position = self._positions[index]
        values = run[position]
        self.scores[index] = score(values, self._labels)
        return values


def probabilities(logits: NDArray[np.float32]) -> Probabilities:
    """Return the softmax of logits over the last axis, in float64."""
    return softmax(logits.astype(np.float64), axis=-1)  # type: ignore[no-any-return]
