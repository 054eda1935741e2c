"""Train what a comparison plans, wherever its executor does it, and say what came of it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from snapcore.backend import available_backends
from snapcore.ensemble import FEW
from snapcore.errors import DataError, SnapcoreError, StoreError
from snapcore.lab.added import added_results
from snapcore.lab.backends import start_backend
from snapcore.lab.cells import Cell, Plan, cell_directory, finished, train_cell
from snapcore.lab.comparison import summary
from snapcore.lab.datasets import Dataset
from snapcore.lab.executors import Executor, Future, Processes
from snapcore.lab.ours import COMPARISON, refuse_foreign
from snapcore.lab.sealed import write_sealed

ATTEMPTS = 3
"""How often a cell is begun whose worker dies; each goes on from the resume point of the one before."""

log = logging.getLogger("snapcore")

_POLL = 0.1  # seconds
Watch = Callable[[Mapping[Cell, Mapping[str, Any]], int], None]


def compare(
    plan: Plan,
    directory: Path,
    *,
    add: Sequence[Path] = (),
    executor: Executor | None = None,
    resume_every: int | None = None,
    least: float = 0.0,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train every cell that is not done yet, compare the methods, and write `comparison.json`.

    A cell that is done is never trained again: methods and seeds added later cost only themselves. One that was killed
    resumes.

    Arguments:
        plan: methods, seeds, and what all trainings share.
        directory: the comparison's own; with workers on other machines, one that all see.
        add: runs that something else made, called `NAME-seedK`, with predictions; see `added_results`.
        executor: where to train; default here, one cell after the other.
        resume_every: updates between two resume points of a cell.
        least: the gain under which a method is not worth it, in the score that decides.
        watch: called with the results so far and the number of cells left, whenever one is done.

    Returns:
        What `comparison.json` holds: by method the lists of updates and scores by seed, paired comparisons, how many
        independent networks each method is worth, what failed, and the verdict.

    Raises:
        StoreError: the directory holds another comparison, or files that are not snapcore's.
        DataError: methods of unequal budgets, runs tested on different examples, or no cell could be trained.
    """
    refuse_foreign(directory, [COMPARISON])
    dataset = plan.job.dataset()
    plan = _of_this_data(plan, dataset)
    few = len(dataset.y_held_out) < FEW
    if few and plan.job.held_out and dataset.kind in ("classes", "labels") and not dataset.positions:
        log.warning(
            "%d examples are held out: under %d one method may be calibrated and another not; raise --held-out",
            len(dataset.y_held_out),
            FEW,
        )
    others = added_results(add, plan.job, dataset)
    _refuse_double(others, plan)
    jobs = {cell: plan.job_of(cell) for cell in plan}
    plan.keep(directory)
    known = {cell: finished(job, cell_directory(directory, cell)) for cell, job in jobs.items()}
    results: dict[Cell, Mapping[str, Any]] = {cell: found for cell, found in known.items() if found is not None}
    failed: dict[Cell, str] = {}
    say = watch or _nobody
    say(results, len(jobs) - len(results))
    calls = {
        cell: (msgspec.to_builtins(jobs[cell]), str(cell_directory(directory, cell).absolute()), resume_every)
        for cell in plan
        if cell not in results
    }
    for cell, outcome in _here(calls) if executor is None else _elsewhere(calls, executor):
        if isinstance(outcome, str):
            failed[cell] = outcome
            log.warning("%s failed: %s", cell.name, outcome)
        else:
            results[cell] = outcome
        say(results, len(jobs) - len(results) - len(failed))
    found = summary({**results, **others}, failed, methods=plan.methods, least=least)
    try:
        write_sealed(directory / COMPARISON, found)
    except OSError as error:
        raise StoreError(f"{directory} cannot be written: {error}; choose another --output") from error
    return found


def _of_this_data(plan: Plan, dataset: Dataset) -> Plan:
    """Return the plan with the data's digest and task in it, once every method is known to fit.

    Raises:
        BackendNotFoundError: there is no such backend.
        DataError, ScheduleError: a method has no such schedule over these data.
    """
    if plan.job.backend not in available_backends():
        start_backend(plan.job.backend)  # which says what there is
    facts = {"loss": dataset.loss, "task": dataset.kind, "data_sha256": dataset.sha256}
    found = msgspec.structs.replace(plan, job=msgspec.structs.replace(plan.job, **facts))
    data = found.job.training_data(dataset)
    for cell in found:
        if cell.seed == found.seeds[0]:
            found.job_of(cell).program(data)
    return found


def _refuse_double(others: Mapping[Cell, Any], plan: Plan) -> None:
    """Raise `DataError` for a run that is called as a cell of the plan."""
    double = [cell.name for cell in plan if cell in others]
    if double:
        raise DataError(f"{', '.join(double)} would be there twice: rename what is added")


def _nobody(done: Mapping[Cell, Mapping[str, Any]], left: int) -> None:
    """Where nobody watches."""


def _here(calls: Mapping[Cell, tuple[Any, ...]]) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    for cell, arguments in calls.items():
        try:
            yield cell, train_cell(*arguments)
        except SnapcoreError as error:
            yield cell, str(error)


def _elsewhere(
    calls: Mapping[Cell, tuple[Any, ...]], executor: Executor
) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    """Have all cells trained, and yield each that is done. What is not an error of ours is a worker that died."""
    # Processes of ours are given no more than they can begin: one that dies takes down all that its pool was given.
    most = executor.jobs if isinstance(executor, Processes) else len(calls)
    waiting, attempts = list(calls), dict.fromkeys(calls, 1)
    running: dict[Cell, Future] = {}
    while running or waiting:
        while waiting and len(running) < most:
            running[waiting[0]] = executor.submit(train_cell, *calls[waiting[0]])
            waiting.pop(0)
        for cell in [cell for cell, future in running.items() if future.done()]:
            future = running.pop(cell)
            error = future.exception()
            if error is None:
                yield cell, future.result()
            elif isinstance(error, SnapcoreError):
                yield cell, str(error)
            elif attempts[cell] == ATTEMPTS:
                yield cell, f"tried {ATTEMPTS} times, at last {type(error).__name__}: {error}"
            else:
                log.info("%s is begun again where it was: %s", cell.name, type(error).__name__)
                attempts[cell] += 1
                waiting.insert(0, cell)
        time.sleep(_POLL)
