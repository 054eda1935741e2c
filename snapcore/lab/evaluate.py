"""Score the ensembles of one run, or of several together."""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from snapcore.backend import Backend, load_backend
from snapcore.data import TrainingData
from snapcore.ensemble import prefix_curve
from snapcore.errors import DataError, StoreError
from snapcore.lab.data import Dataset
from snapcore.lab.job import Job, load_job
from snapcore.lab.scoring import Joined, Noted, Predictions
from snapcore.metrics import score
from snapcore.protocol import program_from_dict
from snapcore.store import SnapshotStore

RESULTS = "results.json"


def evaluate(directories: Sequence[Path], *, last: int | None = None) -> dict[str, Any]:
    """Score every member, and the ensembles of the last m for m = 1 … all, on the test images.

    Arguments:
        directories: runs made by `snapcore train` on the same data; their members form one ensemble, the
            last directory's members being the last.
        last: how many members of each run, counted from its end; default all finished ones.

    Returns:
        What `results.json` holds: `error` in percent, `nll` in nats per example.

    Raises:
        StoreError: a directory holds no run, or too few finished members.
        DataError: the runs were tested on different images.
    """
    began = time.perf_counter()
    jobs = [load_job(directory) for directory in directories]
    datasets = [job.dataset() for job in jobs]
    labels = datasets[0].y_test
    if any(not np.array_equal(dataset.y_test, labels) for dataset in datasets):
        raise DataError(f"the runs were tested on different images: {', '.join(sorted({job.data for job in jobs}))}")
    backend = functools.cache(load_backend)
    runs = [
        _predictions(directory, job, dataset, backend(job.backend), last)
        for directory, job, dataset in zip(directories, jobs, datasets, strict=True)
    ]
    noted = Noted(Joined(runs), functools.partial(score, labels=labels))
    curve = prefix_curve(noted, labels)
    members = [member for run in runs for member in run.members]
    return {
        **{name: _joined(getattr(job, name) for job in jobs) for name in ("backend", "data", "model", "method")},
        "updates": sum(_updates(directory) for directory in directories),
        "seconds": round(time.perf_counter() - began, 3),
        "members": [
            {"index": member.index, "step": member.step, "lr": member.lr, **noted.scores[place]}
            for place, member in enumerate(members)
        ],
        "ensemble": curve,
    }


def write_results(results: dict[str, Any], directory: Path) -> Path:
    """Write `results.json` into a directory and return its path."""
    path = directory / RESULTS
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}; choose another --output") from error
    return path


def _predictions(directory: Path, job: Job, dataset: Dataset, backend: Backend[Any], last: int | None) -> Predictions:
    store = SnapshotStore(directory)
    one = TrainingData(dataset.x_train[:1], dataset.y_train[:1], dataset.n_classes, 1)  # only its shape is needed
    state = backend.init(job.resolved_model(), one, _program(store), seed=job.seed)
    return Predictions(store, backend, state, dataset.x_test, last)


def _program(store: SnapshotStore) -> Any:
    if store.program is None:
        raise StoreError(f"{store.path} says nothing of its program: it was not made by snapcore train")
    return program_from_dict(store.program)


def _updates(directory: Path) -> int:
    return int(_program(SnapshotStore(directory)).updates)


def _joined(names: Any) -> str:
    return "+".join(dict.fromkeys(names))
