"""Runs that `snapcore compare` did not train: of a loop of one's own, with the predictions of its members."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snapcore.ensemble import Predictions, prefix_curve
from snapcore.errors import DataError, StoreError
from snapcore.lab.cells import COSTLY, Cell
from snapcore.lab.datasets import Dataset
from snapcore.lab.evaluate import calibrate
from snapcore.lab.job import Job
from snapcore.lab.predictions import finished_members
from snapcore.store import SnapshotStore

_NAME = re.compile(r"(?P<method>.+)-seed(?P<seed>\d+)")


def added_results(runs: Sequence[Path], job: Job, dataset: Dataset) -> dict[Cell, dict[str, Any]]:
    """Return what each run's predictions say, as `results.json` would.

    Arguments:
        runs: run directories that are called `NAME-seedK`, each with `predictions/test.safetensors`, which
            `Predictions.save` wrote; and `predictions/held-out.safetensors`, where the comparison calibrates.
        job: what the comparison trains, at whose budget they must have been made; `independent` costs what it does.
        dataset: on whose test examples.

    Raises:
        StoreError: a directory is no run, or has no predictions of its members.
        DataError: its name does not say which seed it is, it predicts other examples, or has cost other updates.
    """
    updates = job.program(job.training_data(dataset)).updates
    found: dict[Cell, dict[str, Any]] = {}
    for run in runs:
        name = _NAME.fullmatch(run.absolute().name)
        if name is None:
            raise DataError(f"{run} must be called NAME-seedK, so that it can be paired with others: rename it")
        members = finished_members(SnapshotStore(run))
        test = _predictions(run, "test", len(members))
        if not np.array_equal(test.labels_of(slice(None)), dataset.y_test):
            raise DataError(f"{run} was tested on other examples than {dataset.name}'s test set, or in another order")
        cell, cost = Cell(name["method"], int(name["seed"])), members[-1].step
        if cell in found:
            raise DataError(f"{cell.name} would be there twice: rename what is added")
        if cost != updates and cell.method != COSTLY:
            raise DataError(
                f"methods are compared at equal budgets, got {cost:,} updates in {run} and {updates:,} "
                "here: leave it out, or choose --epochs to fit"
            )
        curve = prefix_curve(test)
        if job.held_out:
            calibrate(curve, _predictions(run, "held-out", len(members)), test)
        found[cell] = {"updates": cost, "ensemble": curve}
    return found


def _predictions(run: Path, split: str, members: int) -> Predictions:
    path = run / "predictions" / f"{split}.safetensors"
    if not path.exists():
        raise StoreError(f"{path} does not exist: save the members' predictions there, Predictions(…, labels).save")
    made = Predictions.open(path)
    if made.labels is None or len(made) != members:
        raise DataError(f"{path} must hold labels and all {members} members of the run, in order, got {len(made)}")
    return made
