"""Score the ensembles of one run, or of several together; and choose, weight and calibrate the members of one."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snapcore.ensemble import (
    FEW,
    Predictions,
    Recipe,
    RunsOffError,
    fit_cascade,
    fit_temperature,
    fit_weights,
    prefix_curve,
    rank_correlation,
    run_cascade,
    score_predictions,
    select,
    uncertainty,
)
from snapcore.errors import DataError, StoreError
from snapcore.lab.backends import threads_of
from snapcore.lab.datasets import Dataset
from snapcore.lab.job import Job, load_job
from snapcore.lab.ours import RESULTS, refuse_foreign
from snapcore.lab.predictions import as_predictions, finished_members, predictions_file, predictions_of
from snapcore.lab.sealed import write_sealed
from snapcore.metrics import score
from snapcore.store import Member, SnapshotStore

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

    Predictions are kept in the runs: what has not changed is not run again. Where all runs kept the same training
    images back, each ensemble is also scored at the temperature that fits those best.

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
        What `results.json` holds: the scores that `score_predictions` gives for the task, `error` in percent, `nll` in
        nats; `temperature` and `calibrated_nll` where training images were kept back and the task has a temperature;
        and `spread_correlation` where it is known how far apart people are on each example: the rank correlation of
        that with each part of the whole ensemble's uncertainty.

    Raises:
        StoreError: a directory holds no run, or not the members asked for.
        DataError: the runs were tested on different images, the images have changed, or a model is not to be imported.
    """
    jobs = [load_job(directory) for directory in directories]
    _refuse_models(directories, jobs, model, trust_model)
    datasets = [job.dataset(data_dir) for job in jobs]
    first = datasets[0]
    if any(not np.array_equal(each.y_test, first.y_test) or each.kind != first.kind for each in datasets):
        where = " and ".join(f"{directory} ({job.data})" for directory, job in zip(directories, jobs, strict=True))
        raise DataError(
            f"{where} were tested on different images: give runs on the same data and task, or one at a time"
        )
    stores = [SnapshotStore(directory) for directory in directories]
    began = time.perf_counter()
    rows: list[Member] = []
    tested: list[Predictions] = []
    held_out: list[Predictions] = []
    for store, job, dataset in zip(stores, jobs, datasets, strict=True):
        _compare_images(store, job, dataset, moved=data_dir is not None)
        chosen = _chosen(store, finished_members(store), last, members)
        rows += chosen
        tested.append(predictions_of(store, job, dataset, members=chosen, device=device))
        if job.held_out:
            held_out.append(predictions_of(store, job, dataset, "held-out", members=chosen, device=device))
    test = _together(first, tested)
    curve = prefix_curve(test)
    if first.positions:
        for row in curve:
            row["perplexity"] = math.exp(row["nll"])
    answers = [dataset.y_held_out for dataset in datasets]
    if len(held_out) == len(tested) and all(np.array_equal(each, answers[0]) for each in answers):
        calibrate(curve, _together(first, held_out), test)
    return {
        **{name: _joined(getattr(job, name) for job in jobs) for name in ("backend", "data", "model", "method")},
        "task": first.kind,
        "loss": _joined(dataset.loss for dataset in datasets),
        "updates": sum(store.members[-1].step for store in stores),
        "seconds": round(time.perf_counter() - began, 3),
        "threads": max(threads_of(job.backend) for job in jobs),
        "members": [
            {
                "index": member.index,
                "step": member.step,
                "lr": member.lr,
                **score_predictions(_members(test, slice(position, position + 1))),
            }
            for position, member in enumerate(rows)
        ],
        "ensemble": curve,
        **({} if first.spread is None else {"spread_correlation": _spread_correlation(test, first.spread)}),
    }


def _together(dataset: Dataset, parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions of the members of several runs as one; those of one run stay in their file."""
    if len(parts) == 1:
        return parts[0]
    return as_predictions(dataset, [member for part in parts for member in part], parts[0].labels_of(slice(None)))


def _members(predictions: Predictions, which: slice) -> Predictions:
    """Return the predictions of some of the members."""
    return Predictions(predictions[which], predictions.labels, kind=predictions.kind, ignore=predictions.ignore)


def _spread_correlation(test: Predictions, spread: NDArray[np.float64]) -> dict[str, float | None]:
    """Return the rank correlation of each part of the uncertainty with the spread; None for a part that is constant."""
    parts = uncertainty(test)._asdict()
    found = {name: rank_correlation(parts[name], spread) for name in ("total", "aleatoric", "epistemic")}
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def keep_predictions(
    directory: Path,
    split: str,
    *,
    data_dir: Path | None = None,
    model: str | None = None,
    trust_model: bool = False,
    device: str | None = None,
) -> tuple[Path, Predictions]:
    """Keep a run's predictions for a part of its data, and return the file and what is in it.

    Arguments:
        directory: a run made by `snapcore train`.
        split: `test` or `held-out`.
        data_dir: as for `evaluate`, as the others.
        model: the `package.module:function` that a run may name.
        trust_model: whether to import whatever function a run names.
        device: where to compute.

    Raises:
        StoreError, DataError: as for `evaluate`, or nothing was kept back.
    """
    store, job, dataset = _opened(directory, data_dir, model, trust_model)
    found = predictions_of(store, job, dataset, split, device=device)
    return predictions_file(store, split), found


def select_members(
    directory: Path,
    *,
    by: str = "select",
    size: int = 25,
    tolerance: float | None = None,
    rule: str = "probability",
    data_dir: Path | None = None,
    model: str | None = None,
    trust_model: bool = False,
    device: str | None = None,
) -> tuple[Recipe, dict[str, Any]]:
    """Choose, weight and calibrate a run's members on the training images that it kept back, as a recipe.

    With fewer than 500 of these, what does not help on the half that it was not fitted on is not fitted, which is said.

    Arguments:
        directory: a run made by `snapcore train --held-out`.
        by: `select`, `weights`, or `equal`, which only calibrates.
        size: how many choices `select` makes at most.
        tolerance: for a cascade too: by how many percentage points the error that all members expect may rise.
        rule: of the cascade.
        data_dir: as for `evaluate`, as the others.
        model: the `package.module:function` that a run may name.
        trust_model: whether to import whatever function a run names.
        device: where to compute.

    Returns:
        The recipe, and scores on the test images by name: `equal` and `recipe`, and `cascade` with `members_used`.

    Raises:
        StoreError, DataError: as for `evaluate`, or nothing was kept back.
    """
    store, job, dataset = _opened(directory, data_dir, model, trust_model)
    if tolerance is not None and (dataset.kind != "classes" or dataset.positions):
        what = "a class for each pixel" if dataset.positions else dataset.kind
        raise DataError(
            f"--tolerance is of a cascade, for one class an example; {directory} predicts {what}: leave it out"
        )
    held_out = predictions_of(store, job, dataset, "held-out", device=device)
    test = predictions_of(store, job, dataset, device=device)
    recipe = _worthwhile(directory, _FITS[by](held_out, size), held_out)
    if dataset.kind in _WITH_TEMPERATURE:
        try:
            recipe = _worthwhile(directory, fit_temperature(held_out, recipe), held_out, recipe)
        except RunsOffError as error:
            log.info("%s has no temperature: %s", directory, error)
    equal = score_predictions(test)
    chosen = score_predictions(test, weights=recipe.weights, temperature=recipe.temperature)
    report: dict[str, Any] = {"equal": equal, "recipe": chosen}
    if tolerance is not None:
        recipe = fit_cascade(held_out, tolerance=tolerance, rule=rule, recipe=recipe, expected=True)
        logs, used = run_cascade(test, recipe)
        report["cascade"] = {**score(logs, dataset.y_test, log=True), "members_used": float(used.mean())}
    if recipe.fitted is not None:
        measure = "nll" if "nll" in equal else "rmse"
        recipe = replace(recipe, fitted=replace(recipe.fitted, test=equal[measure] - chosen[measure]))
    return recipe, report


def _opened(
    directory: Path, data_dir: Path | None, model: str | None, trusted: bool
) -> tuple[SnapshotStore, Job, Dataset]:
    """Return a run, its job and its data, once they are known to fit together."""
    job = load_job(directory)
    _refuse_models([directory], [job], model, trusted)
    dataset, store = job.dataset(data_dir), SnapshotStore(directory)
    _compare_images(store, job, dataset, moved=data_dir is not None)
    return store, job, dataset


_FITS: Mapping[str, Callable[[Predictions, int], Recipe]] = {
    "select": lambda predictions, size: select(predictions, size=size),
    "weights": lambda predictions, _: fit_weights(predictions),
    "equal": lambda predictions, _: Recipe((1.0,) * len(predictions), members=predictions.members),
}
WAYS = tuple(_FITS)
"""How `select_members` may weigh members."""

_WITH_TEMPERATURE = ("classes", "labels")


def _worthwhile(directory: Path, fitted: Recipe, held_out: Predictions, before: Recipe | None = None) -> Recipe:
    """Return a recipe, or what was before if few rows show no gain."""
    plain = before or Recipe((1.0,) * len(held_out), members=held_out.members)
    if fitted.fitted is None or held_out.examples >= FEW:
        return fitted
    gained = before.fitted.gain if before is not None and before.fitted is not None else 0.0
    if fitted.fitted.gain is not None and fitted.fitted.gain > (gained or 0.0):
        return fitted
    what = "weights" if before is None else "a temperature"
    log.info("%s: without %s, of which %d held-out examples show no gain", directory, what, held_out.examples)
    return plain


def calibrate(curve: list[dict[str, float]], held_out: Predictions, test: Predictions) -> None:
    """Add to each row the temperature fitted on held-out examples, and the NLL at it on the test examples.

    Rows without stand for a temperature that runs off, or of which few examples show no gain, or a task that has none.
    """
    if test.kind not in _WITH_TEMPERATURE:
        return
    for row in curve:
        first = len(test) - int(row["m"])
        try:
            recipe = fit_temperature(_members(held_out, slice(first, None)))
        except RunsOffError:
            continue
        gain = recipe.fitted.gain if recipe.fitted is not None else None
        if held_out.examples < FEW and not (gain or 0.0) > 0:
            continue
        scores = score_predictions(_members(test, slice(first, None)), temperature=recipe.temperature)
        row.update(temperature=recipe.temperature, calibrated_nll=scores["nll"])


def _chosen(
    store: SnapshotStore, finished: Sequence[Member], last: int | None, members: Sequence[int] | None
) -> list[Member]:
    """Return the members asked for, of the finished."""
    indexes = [member.index for member in finished]
    if members is None:
        count = len(finished) if last is None else last
        if not 1 <= count <= len(finished):
            raise StoreError(f"last must be in 1..{len(finished)}, the finished members of {store.path}; got {last}")
        return list(finished[-count:])
    if last is not None:
        raise StoreError(f"last and members exclude each other, got {last} and {list(members)}: leave one of them out")
    if not members or len(set(members)) < len(members) or not set(members) <= set(indexes):
        raise StoreError(f"members must be of {indexes}, the finished ones of {store.path}; got {list(members)}")
    return [finished[indexes.index(index)] for index in members]


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
