"""Train a job to its end, show it while it runs, and score what came of it."""

import time
from pathlib import Path
from typing import Any

from snapcore.backend import Backend
from snapcore.errors import StoreError
from snapcore.lab.display import Display
from snapcore.lab.evaluate import RESULTS, evaluate, write_results
from snapcore.lab.history import History
from snapcore.lab.job import FILE, Job, load_job
from snapcore.lab.plots import plot_training
from snapcore.lab.predictions import probabilities
from snapcore.metrics import score
from snapcore.protocol import Snapshot
from snapcore.run import execute
from snapcore.store import MANIFEST, SnapshotStore, clear_point, move_aside

PLOT = "training.png"


def train(
    job: Job,
    backend: Backend[Any],
    directory: Path,
    display: Display,
    *,
    resume: bool = True,
    resume_every: int | None = None,
) -> dict[str, Any]:
    """Run a job, and write members, `history.csv`, `training.png` and `results.json` into `directory`.

    Started again after a kill, it resumes, and ends with the members and results of a run that was never stopped.
    What cannot be run at all is refused before the directory is touched.

    Arguments:
        job: what to do.
        backend: the one `job.backend` names.
        directory: the run's own.
        display: shows progress.
        resume: resume an unfinished run that is there; False moves any run aside.
        resume_every: updates between two resume points, beside those at every cycle's end.

    Returns:
        What `results.json` holds.

    Raises:
        DataError, ScheduleError, ProtocolError: the job cannot be run.
        StoreError: the directory holds a finished run, or another job's.
    """
    dataset = job.dataset()
    data = job.training_data(dataset)
    program = job.program(data)
    job.state(backend, dataset, program)  # raises for a model that cannot be built
    trained = _open(job, directory, resume)
    history = History(directory, program.schedule)
    members = len(program.schedule.snapshot_steps)
    display.line(
        f"{job.method} on {dataset.name}: {job.model}, {len(dataset.x_train)} training images, "
        f"{program.updates} updates, {members} {'member' if members == 1 else 'members'}; {backend.about()}"
    )
    began = time.perf_counter()
    if not trained:

        def measure(snapshot: Snapshot, state: Any) -> dict[str, float]:
            history.write()  # before the member: once the last one is there, nothing is done again
            scores = score(probabilities(backend.logits(state, dataset.x_test)), dataset.y_test)
            display.member(snapshot, scores)
            return scores

        with display.progress(program) as show:

            def report(step: int, loss: float) -> None:
                history.report(step, loss)
                show(step, loss)

            execute(
                program,
                backend,
                model=job.resolved_model(),
                data=data,
                directory=directory,
                seed=job.seed,
                report=report,
                metrics=measure,
                resume_every=resume_every,
                before_point=history.write,
            )
    results = {**evaluate([directory]), "seconds": round(time.perf_counter() - began, 3)}
    if history.rows:
        plot_training(history.rows, program.schedule, directory / PLOT)
    write_results(results, directory)
    return results


def is_resumable(job: Job, directory: Path) -> bool:
    """Return whether a directory holds this very job, not yet trained to its end and scored."""
    if not (directory / FILE).exists() or load_job(directory) != job:
        return False
    return not ((directory / RESULTS).exists() and _is_trained(directory))


def _open(job: Job, directory: Path, resume: bool) -> bool:
    """Make the directory this job's; return whether it is trained, and has only to be scored."""
    held = (directory / MANIFEST).exists()
    if held and not resume:
        move_aside(directory)
    if not held or not resume:
        job.save(directory)
        return False
    job.refuse_other(directory)
    if not is_resumable(job, directory):
        raise StoreError(
            f"{directory} holds a run that is finished: score it with snapcore evaluate, choose another --output, or "
            "pass --no-resume, which moves it aside"
        )
    if not _is_trained(directory):
        return False
    with SnapshotStore(directory, "w"):  # which sweeps up after a process that was killed
        clear_point(directory)
    return True


def _is_trained(directory: Path) -> bool:
    return (directory / MANIFEST).exists() and SnapshotStore(directory).stopped is not None
