"""Members' predictions, one member at a time, and the scores of every ensemble of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from snapcore.backend import Backend
from snapcore.errors import StoreError
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
        count = len(finished) if last is None else last
        if not 1 <= count <= len(finished):
            raise StoreError(f"{store.path} has {len(finished)} finished members, got last={last}: ask for fewer")
        self.members: list[Member] = finished[-count:]
        self._store, self._backend, self._state, self._x = store, backend, state, x

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: Any) -> Any:
        tensors = self._store.load(self.members[index].index)
        self._state = self._backend.restore(self._state, tensors, optimizer="keep")
        return probabilities(self._backend.logits(self._state, self._x))


class Joined(Sequence[Probabilities]):
    """Several runs' predictions, one after the other."""

    def __init__(self, runs: Sequence[Predictions]) -> None:
        self._places = [(run, index) for run in runs for index in range(len(run))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        run, place = self._places[index]
        return run[place]


class Noted(Sequence[Probabilities]):
    """Predictions that are scored one by one as they are passed on."""

    def __init__(self, predictions: Sequence[Probabilities], score: Any) -> None:
        self._predictions, self._score = predictions, score
        self.scores: dict[int, Mapping[str, float]] = {}

    def __len__(self) -> int:
        return len(self._predictions)

    def __getitem__(self, index: Any) -> Any:
        values = self._predictions[index]
        self.scores[index] = self._score(values)
        return values


def probabilities(logits: NDArray[np.float32]) -> Probabilities:
    """Return the softmax of logits over the last axis, in float64."""
    return softmax(logits.astype(np.float64), axis=-1)  # type: ignore[no-any-return]
