"""Score the ensembles of one run, or of several together."""

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from snapcore.ensemble import prefix_curve
from snapcore.errors import DataError, StoreError
from snapcore.lab.backends import start_backend, threads_of
from snapcore.lab.datasets import Dataset
from snapcore.lab.job import Job, load_job
from snapcore.lab.ours import RESULTS, refuse_foreign
from snapcore.lab.predictions import Predictions, Scored
from snapcore.lab.sealed import write_sealed
from snapcore.protocol import program_from_dict
from snapcore.store import SnapshotStore

log = logging.getLogger("snapcore")


def evaluate(
    directories: Sequence[Path],
    *,
    last: int | None = None,
    members: Sequence[int] | None = None,
    data_dir: Path | None = None,
    model: str | None = None,
    trust_model: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Score every member, and the ensembles of the last m for m = 1 … all, on the test images.

    A run may name a model that is code of somebody's. It is imported only if the caller names the very same, or
    trusts whatever a run names.

    Arguments:
        directories: runs made by `snapcore train` on the same data; their members form one ensemble, the
            last directory's members being the last.
        last: how many members of each run, counted from its end; default all finished ones.
        members: which members of each run, by index, instead.
        data_dir: where the images are now; default where they were.
        model: the `package.module:function` that a run may name.
        trust_model: whether to import whatever function a run names.
        device: where to compute; default where the run was trained.

    Returns:
        What `results.json` holds: `error` in percent, `nll` in nats per example.

    Raises:
        StoreError: a directory holds no run, or not the members asked for.
        DataError: the runs were tested on different images, the images have changed, or a model is not to be imported.
    """
    jobs = [load_job(directory) for directory in directories]
    _refuse_models(directories, jobs, model, trust_model)
    datasets = [job.dataset(data_dir) for job in jobs]
    labels = datasets[0].y_test
    if any(not np.array_equal(dataset.y_test, labels) for dataset in datasets):
        where = " and ".join(f"{directory} ({job.data})" for directory, job in zip(directories, jobs, strict=True))
        raise DataError(f"{where} were tested on different images: give runs on the same data, or one at a time")
    stores = [SnapshotStore(directory) for directory in directories]
    backends = {name: start_backend(name) for name in dict.fromkeys(job.backend for job in jobs)}
    began = time.perf_counter()
    runs = []
    for store, job, dataset in zip(stores, jobs, datasets, strict=True):
        _compare_images(store, job, dataset, moved=data_dir is not None)
        if store.program is None:
            raise StoreError(f"{store.path} has no program: snapcore train did not make it; choose another")
        placed = job if device is None else msgspec.structs.replace(job, device=device)
        state = placed.state(backends[job.backend], dataset, program_from_dict(store.program))
        runs.append(Predictions(store, backends[job.backend], state, dataset.x_test, last=last, members=members))
    scored = Scored(runs, labels)
    curve = prefix_curve(scored, labels)
    return {
        **{name: _joined(getattr(job, name) for job in jobs) for name in ("backend", "data", "model", "method")},
        "updates": sum(store.members[-1].step for store in stores),
        "seconds": round(time.perf_counter() - began, 3),
        "threads": max(threads_of(backend) for backend in backends.values()),
        "members": [
            {"index": member.index, "step": member.step, "lr": member.lr, **scored.scores[position]}
            for position, member in enumerate(scored.members)
        ],
        "ensemble": curve,
    }


def write_results(results: dict[str, Any], directory: Path) -> Path:
    """Write `results.json` into a directory and return its path.

    Raises:
        StoreError: it cannot be written, or what is there is not snapcore's.
    """
    path = directory / RESULTS
    refuse_foreign(directory, [RESULTS])
    try:
        write_sealed(path, results)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}; choose another --output") from error
    return path


def _refuse_models(directories: Sequence[Path], jobs: Sequence[Job], model: str | None, trusted: bool) -> None:
    """Raise `DataError` for code that a run names and the caller has not: importing it executes it."""
    if model is not None and model not in {job.model for job in jobs}:
        raise DataError(f"--model must be one that a run names, {_joined(job.model for job in jobs)}; got {model}")
    for directory, job in zip(directories, jobs, strict=True):
        if job.has_own_model and not trusted and job.model != model:
            raise DataError(
                f"{directory} names code, which would be executed: if you trust it, pass --model {job.model}, or "
                "--trust-model"
            )


def _compare_images(store: SnapshotStore, job: Job, dataset: Dataset, *, moved: bool) -> None:
    if job.data_sha256 == dataset.sha256:
        return
    if not moved:
        raise DataError(
            f"{store.path} was trained on other images than {job.data} has now: restore them, or pass --data-dir to "
            "score on others"
        )
    log.warning("%s was trained on other images than those in --data-dir", store.path)


def _joined(names: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(names))
