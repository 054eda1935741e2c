"""Score the ensembles of one run, or of several together."""

import functools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from snapcore.backend import load_backend
from snapcore.ensemble import prefix_curve
from snapcore.errors import DataError, StoreError
from snapcore.lab.job import load_job
from snapcore.lab.predictions import Predictions, Scored
from snapcore.protocol import program_from_dict
from snapcore.store import SnapshotStore, atomic_write

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
        where = " and ".join(f"{directory} ({job.data})" for directory, job in zip(directories, jobs, strict=True))
        raise DataError(f"{where} were tested on different images: give runs on the same data, or one at a time")
    stores = [SnapshotStore(directory) for directory in directories]
    backend = functools.cache(load_backend)
    runs = []
    for store, job, dataset in zip(stores, jobs, datasets, strict=True):
        if store.program is None:
            raise StoreError(f"{store.path} has no program: snapcore train did not make it; choose another")
        state = job.state(backend(job.backend), dataset, program_from_dict(store.program))
        runs.append(Predictions(store, backend(job.backend), state, dataset.x_test, last))
    scored = Scored(runs, labels)
    curve = prefix_curve(scored, labels)
    return {
        **{name: _joined(getattr(job, name) for job in jobs) for name in ("backend", "data", "model", "method")},
        "updates": sum(store.members[-1].step for store in stores),
        "seconds": round(time.perf_counter() - began, 3),
        "members": [
            {"index": member.index, "step": member.step, "lr": member.lr, **scored.scores[position]}
            for position, member in enumerate(scored.members)
        ],
        "ensemble": curve,
    }


def write_results(results: dict[str, Any], directory: Path) -> Path:
    """Write `results.json` into a directory and return its path."""
    path = directory / RESULTS
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}; choose another --output") from error
    return path


def _joined(names: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(names))
