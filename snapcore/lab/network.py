"""A run's network with any weights put into it: a member's, what lies between two of them, or their mean."""

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from snapcore.backend import resolved
from snapcore.ensemble import score_predictions
from snapcore.errors import DataError, StoreError
from snapcore.lab.backends import start_backend
from snapcore.lab.datasets import Dataset
from snapcore.lab.job import Job, load_job
from snapcore.lab.predictions import as_predicted, as_predictions
from snapcore.protocol import program_from_dict
from snapcore.store import SnapshotStore, Tensors

FEW = 1024
"""Training images that batch statistics are re-estimated on where that is done many times over."""


class Network:
    """The network that a run trained, without its weights.

    Arguments:
        store: the run.
        job: what it was asked to do.
        dataset: its data.
        device: where to compute; default where the run was trained.

    Raises:
        StoreError: the run has no program.
        DataError: the model does not fit the data.
    """

    def __init__(self, store: SnapshotStore, job: Job, dataset: Dataset, device: str | None = None) -> None:
        if store.program is None:
            raise StoreError(f"{store.path} has no program: snapcore train did not make it; choose another")
        self._backend, self._dataset = start_backend(job.backend), dataset
        placed = job if device is None else msgspec.structs.replace(job, device=device)
        self._state = placed.state(self._backend, dataset, program_from_dict(store.program))

    def put(self, weights: Tensors, images: NDArray[np.float32] | None = None) -> None:
        """Put weights into the network.

        Arguments:
            weights: named arrays, as a member has them.
            images: what batch statistics are re-estimated on; default: they are as in `weights`.
        """
        self._state = self._backend.restore(self._state, weights, optimizer="keep")
        if images is not None:
            self._state = self._backend.refresh(self._state, images)

    def weights(self) -> Tensors:
        """Return the weights that are in it now, batch statistics among them."""
        return resolved(self._backend.capture(self._state))

    def scores(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> dict[str, float]:
        """Return the scores of what it predicts for some examples, as `score_predictions` gives them."""
        outputs = as_predicted(self._dataset, self._backend.logits(self._state, x))
        return score_predictions(as_predictions(self._dataset, [outputs], y))


def require_classes(directory: Path, what: str) -> None:
    """Refuse a run whose members have no error in percent.

    Raises:
        DataError: it is of labels or values.
    """
    job = load_job(directory)
    if job.task not in (None, "classes"):
        raise DataError(f"{what} needs members that tell classes apart, got a run of {job.task}: choose another run")


def first_epoch(job: Job, dataset: Dataset, most: int | None = None) -> NDArray[np.int64]:
    """Return the places of training images in the first epoch's order: at most so many, and at least a batch."""
    data = job.training_data(dataset)
    updates = data.updates_per_epoch if most is None else min(data.updates_per_epoch, max(1, most // job.batch_size))
    return data.indices(0, updates).ravel()
