"""Train a job to its end, show it while it runs, and score what came of it."""

import time
from pathlib import Path
from typing import Any

from snapcore.backend import Backend, Report
from snapcore.lab.data import Dataset
from snapcore.lab.evaluate import evaluate, write_results
from snapcore.lab.history import History
from snapcore.lab.job import Job
from snapcore.lab.plots import plot_training
from snapcore.lab.scoring import probabilities
from snapcore.lab.show import Display
from snapcore.metrics import score
from snapcore.protocol import Program, Snapshot
from snapcore.run import execute

PLOT = "training.png"


def train(job: Job, backend: Backend[Any], directory: Path, display: Display, *, resume: bool) -> dict[str, Any]:
    """Run a job, and write members, `history.csv`, `training.png` and `results.json` into `directory`.

    Arguments:
        job: what to do.
        backend: the one `job.backend` names.
        directory: the run's own.
        display: shows progress.
        resume: False moves a run that is already there aside.

    Returns:
        What `results.json` holds.
    """
    dataset = job.dataset()
    data = job.training_data(dataset)
    program = job.program(data)
    history = History(directory, program.schedule)
    display.line(_headline(job, backend, dataset, program))
    began = time.perf_counter()

    def measure(snapshot: Snapshot, state: Any) -> dict[str, float]:
        if snapshot.index == 1:
            job.save(directory)
        history.write()
        scores = score(probabilities(backend.logits(state, dataset.x_test)), dataset.y_test)
        display.member(snapshot, scores)
        return scores

    with display.progress(program) as show:
        execute(
            program,
            backend,
            model=job.resolved_model(),
            data=data,
            directory=directory,
            seed=job.seed,
            report=_both(history.report, show),
            metrics=measure,
            move_old_aside=not resume,
        )
    history.write()
    results = {**evaluate([directory]), "seconds": round(time.perf_counter() - began, 3)}
    write_results(results, directory)
    plot_training(history.rows, program.schedule, directory / PLOT)
    return results


def _both(first: Report, second: Report) -> Report:
    def report(step: int, loss: float) -> None:
        first(step, loss)
        second(step, loss)

    return report


def _headline(job: Job, backend: Backend[Any], dataset: Dataset, program: Program) -> str:
    members = len(program.schedule.snapshot_steps)
    return (
        f"{job.method} on {dataset.name}: {job.model}, {len(dataset.x_train)} training images, "
        f"{program.updates} updates, {members} {'member' if members == 1 else 'members'}; {backend.about()}"
    )
