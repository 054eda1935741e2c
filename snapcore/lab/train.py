"""Train a job to its end, show it while it runs, and score what came of it."""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import msgspec

from snapcore.backend import Backend
from snapcore.errors import DataError, StoreError
from snapcore.lab.display import Display
from snapcore.lab.evaluate import evaluate, write_results
from snapcore.lab.files import HeldDirectory
from snapcore.lab.history import History
from snapcore.lab.job import MAY_DIFFER, Job, flags, load_job
from snapcore.lab.ours import HISTORY, JOB, PLOT, RESULTS, refuse_foreign
from snapcore.lab.plots import plot_training
from snapcore.lab.predictions import score_outputs
from snapcore.lab.text import counted
from snapcore.protocol import Snapshot
from snapcore.run import execute
from snapcore.store import MANIFEST, SnapshotStore, move_aside, read_point

INTERRUPTED = 130
"""The exit code after Ctrl-C."""

log = logging.getLogger("snapcore")


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
    What cannot be run at all is refused before the directory is touched, and a user's own file is never replaced.

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
        StoreError: the directory holds a finished run, another job's, or files that are not snapcore's.
        SystemExit: with code 130 after Ctrl-C, or 143 after a SIGTERM.
    """
    dataset = job.dataset()
    job = msgspec.structs.replace(job, loss=dataset.loss, task=dataset.kind, data_sha256=dataset.sha256)
    data = job.training_data(dataset)
    program = job.program(data)
    job.state(backend, dataset, program)  # raises for a model that cannot be built or does not fit
    resumed = resume and (directory / MANIFEST).exists()
    changed = _check_resumable(job, directory) if resumed else {}
    if not resumed:
        _make_room(directory)
        job.save(directory)
    held = HeldDirectory(directory)
    history = History(directory, program.schedule, resumed=resumed, check=held.check)
    if changed:
        now = ", ".join(f"{flags([name])} {getattr(job, name)} (was {was})" for name, was in changed.items())
        log.info("%s is resumed with another %s", directory, now)
        job.save(directory)
    display.line(
        f"{job.method} on {dataset.name}: {job.model}, {counted(len(dataset.x_train), f'training {dataset.noun}')}, "
        f"{counted(program.updates, 'update')}, {counted(len(program.schedule.snapshot_steps), 'member')}; "
        f"{backend.about()}"
    )
    began = time.perf_counter()
    if resumed and _is_trained(directory):
        with SnapshotStore(directory, "w") as store:  # which sweeps up after a process that was killed
            store.clear_point()
    else:

        def report(step: int, loss: float) -> None:
            history.report(step, loss)
            show(step, loss)

        def measure(snapshot: Snapshot, state: Any) -> dict[str, float]:
            history.write()  # before the member: once the last one is there, nothing is done again
            scores = score_outputs(dataset, backend.logits(state, dataset.x_test))
            display.member(snapshot, scores)
            return scores

        try:
            with display.progress(program) as show, job.errors_named():
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
                    **job.options(backend),
                )
        except KeyboardInterrupt:
            history.write(anew=True)  # the last write may have been cut short
            raise SystemExit(INTERRUPTED) from None  # the recorder has said from where it resumes
        except DataError:
            if not resumed and held.is_there:
                _withdraw(directory)
            raise
    results = {**evaluate([directory], model=job.model), "seconds": round(time.perf_counter() - began, 3)}
    held.check()
    if history.rows:
        plot_training(history.rows, program.schedule, directory / PLOT)
    write_results(results, directory)
    return results


def is_resumable(job: Job, directory: Path) -> bool:
    """Return whether a directory holds this very job, not yet trained to its end and scored."""
    if not (directory / JOB).exists() or set(job.differing(load_job(directory))) - set(MAY_DIFFER):
        return False
    return not ((directory / RESULTS).exists() and _is_trained(directory))


def _check_resumable(job: Job, directory: Path) -> dict[str, Any]:
    """Raise `StoreError` unless this job can be resumed there; return what may differ and does, as it was."""
    changed = job.refuse_other(directory)
    if not is_resumable(job, directory):
        raise StoreError(
            f"{directory} holds a run that is finished: score it with snapcore evaluate, choose another --output, or "
            "pass --no-resume, which moves it aside"
        )
    refuse_foreign(directory)
    return changed


def _make_room(directory: Path) -> None:
    """Move a run that is there aside; refuse what would take a user's files, or the ground from under a shell."""
    if not (directory / MANIFEST).exists():
        refuse_foreign(directory)
        return
    if Path.cwd().is_relative_to(directory.resolve()):
        raise StoreError(
            f"--no-resume would rename {directory}, which the current directory is in: leave it first, or choose "
            "another --output"
        )
    move_aside(directory)


def _is_trained(directory: Path) -> bool:
    return (directory / MANIFEST).exists() and SnapshotStore(directory).stopped is not None


def _withdraw(directory: Path) -> None:
    """Take a run back that has neither a member nor a resume point; a user's own files stay."""
    begun = (directory / MANIFEST).exists()
    if begun and (SnapshotStore(directory).members or read_point(directory) is not None):
        return
    for name in (JOB, HISTORY, MANIFEST, ".lock"):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not empty, and stays
        directory.rmdir()
