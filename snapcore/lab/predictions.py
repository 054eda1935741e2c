"""Members' predictions for one part of a run's data: made once, and kept until a member or the data change."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import log_expit, log_softmax

from snapcore.ensemble import Predictions, score_predictions
from snapcore.errors import DataError, StoreError
from snapcore.lab.backends import start_backend
from snapcore.lab.datasets import Dataset
from snapcore.lab.job import MAY_DIFFER, Job
from snapcore.protocol import program_from_dict
from snapcore.store import Member, SnapshotStore

SPLITS = ("test", "held-out")

log = logging.getLogger("snapcore")


def predictions_of(
    store: SnapshotStore,
    job: Job,
    dataset: Dataset,
    split: str = "test",
    *,
    members: Sequence[Member] | None = None,
    device: str | None = None,
) -> Predictions:
    """Return the predictions of a run's members; only members whose predictions are not kept are run.

    Arguments:
        store: the run.
        job: what it was asked to do. Predictions kept for another job are not used.
        dataset: its data.
        split: `test` or `held-out`.
        members: of the run; default all finished ones. Others are not even read.
        device: where to compute; default where the run was trained.

    Raises:
        StoreError: the run has no finished member, no program, or a member that is not as it was written.
        DataError: it kept nothing held out, or the model does not fit.
    """
    finished = finished_members(store)
    wanted = finished if members is None else members
    x, y = _part(store, job, dataset, split)
    data = f"{split} {dataset.sha256} {_digest(job)}"
    path = predictions_file(store, split)
    # A model that is somebody's code may have changed under its name, which no digest here would show.
    kept = None if job.has_own_model else _kept(path, data)
    known = {} if kept is None or kept.members is None else dict(zip(kept.members, kept, strict=True))
    for member in wanted:
        if member.sha256 in known:
            store.file(member.index)  # those that are run are checked when they are loaded
    lacking = [member for member in wanted if member.sha256 not in known]
    if lacking:
        made = _run(store, job, dataset, lacking, x, device)
        known |= {member.sha256: each for member, each in zip(lacking, made, strict=True)}
        digests = [member.sha256 for member in finished if member.sha256 in known]
        facts = {"split": split, "data": data, "members": digests}
        _keep(path, as_predictions(dataset, [known[each] for each in digests], y, **facts))
    digests = [member.sha256 for member in wanted]
    if kept is not None and kept.members == tuple(digests):
        return kept  # which lies in its file
    facts = {"split": split, "data": data, "members": digests}
    return as_predictions(dataset, [known[each] for each in digests], y, **facts)


def _digest(job: Job) -> str:
    """Return the SHA-256 of what a member's predictions depend on: all but where the images lie, and what computes."""
    facts = {name: value for name, value in msgspec.structs.asdict(job).items() if name not in MAY_DIFFER}
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


def _keep(path: Path, found: Predictions) -> None:
    try:
        if path.parent.is_symlink():
            raise StoreError(f"{path.parent} is a link, and a run is written only into folders of its own")
        if path.exists() and not Predictions.is_kept_in(path):
            raise StoreError(f"{path} is not snapcore's, and is not replaced: move it away")
        path.parent.mkdir(exist_ok=True)
        found.save(path)
    except OSError as error:  # as in a run on a read-only disk: they are made anew the next time
        log.info("predictions are not kept: %s", error)


def predictions_file(store: SnapshotStore, split: str) -> Path:
    """Return where a run's predictions are kept."""
    return store.path / "predictions" / f"{split}.safetensors"


def finished_members(store: SnapshotStore) -> list[Member]:
    """Return a run's members without the unfinished.

    Raises:
        StoreError: there is none.
    """
    members = [member for member in store.members if not member.unfinished]
    if not members:
        raise StoreError(f"{store.path} holds no finished member: train until the first cycle ends")
    return members


def as_predicted(dataset: Dataset, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what a model's raw outputs say, as `Predictions` hold it.

    Arguments:
        dataset: says which kind of task it is, and the shape of its targets.
        outputs: [examples, …, outputs].

    Returns:
        Log-probabilities of classes, or of each label, [examples, …, outputs]; values in the shape of the targets; or
        in one more axis, of 2, mean and variance.
    """
    wide = outputs.astype(np.float64)
    if dataset.kind == "classes":
        return np.asarray(log_softmax(wide, axis=-1), np.float32)
    if dataset.kind == "labels":
        return np.asarray(log_expit(wide), np.float32)
    shape = (len(outputs), *dataset.y_test.shape[1:])
    if dataset.kind == "values":
        return wide.reshape(shape).astype(np.float32)
    means, logs = np.split(wide, 2, axis=-1)
    limits = np.finfo(np.float32)  # a variance that float32 cannot hold is its smallest or largest number
    variances = np.exp(np.clip(logs, np.log(limits.tiny), np.log(limits.max)))
    return np.stack([means.reshape(shape), variances.reshape(shape)], axis=-1).astype(np.float32)


def as_predictions(
    dataset: Dataset, arrays: Sequence[NDArray[np.float32]], y: NDArray[Any], **facts: Any
) -> Predictions:
    """Return what members predict, [members, examples, …] in the dataset's kind, with the targets `y`."""
    return Predictions(arrays, y, kind=dataset.kind, ignore=dataset.ignore, **facts)


def score_outputs(dataset: Dataset, outputs: NDArray[np.float32]) -> dict[str, float]:
    """Score a model's raw outputs for the test part."""
    return score_predictions(as_predictions(dataset, [as_predicted(dataset, outputs)], dataset.y_test))


def _part(store: SnapshotStore, job: Job, dataset: Dataset, split: str) -> tuple[NDArray[np.float32], NDArray[Any]]:
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if split == "test":
        return dataset.x_test, dataset.y_test
    if not job.held_out:
        raise DataError(
            f"{store.path} kept no training images back: train with --held-out 0.1, since nothing is fitted on the test"
            " images"
        )
    return dataset.x_held_out, dataset.y_held_out


def _kept(path: Path, data: str) -> Predictions | None:
    """Return what is kept, if it is whole and of this data."""
    try:
        found = Predictions.open(path)
    except (DataError, StoreError):
        return None
    return found if found.data == data else None


def _run(
    store: SnapshotStore,
    job: Job,
    dataset: Dataset,
    members: list[Member],
    x: NDArray[np.float32],
    device: str | None,
) -> NDArray[np.float32]:
    """Return what members predict, [members, examples, …]."""
    if store.program is None:
        raise StoreError(f"{store.path} has no program: snapcore train did not make it; choose another")
    backend = start_backend(job.backend)
    placed = job if device is None else msgspec.structs.replace(job, device=device)
    state = placed.state(backend, dataset, program_from_dict(store.program))
    made = []
    for member in members:
        state = backend.restore(state, store.load(member.index), optimizer="keep")
        made.append(as_predicted(dataset, backend.logits(state, x)))
    return np.stack(made)
