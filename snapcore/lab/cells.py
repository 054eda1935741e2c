"""The cells of a comparison: each method with each seed is a run directory, trained once and never again."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from snapcore.errors import DataError, StoreError
from snapcore.lab.backends import start_backend
from snapcore.lab.display import Display
from snapcore.lab.evaluate import evaluate
from snapcore.lab.job import MAY_DIFFER, Job
from snapcore.lab.ours import PLAN, refuse_foreign
from snapcore.lab.sealed import read_sealed, write_sealed
from snapcore.lab.train import is_resumable, train
from snapcore.protocol import METHODS
from snapcore.store import MANIFEST

COSTLY = "independent"
"""The method that costs M trainings: shown at its true cost, and never called worth it at an equal one."""

_VARIED = ("method", "seed")


class Cell(msgspec.Struct, frozen=True):
    """One training of a comparison.

    Arguments:
        method: a name from `snapcore.METHODS`.
        seed: of the weights, of the batches' order and of the held-out examples.
    """

    method: str
    seed: int

    @property
    def name(self) -> str:
        """As its directory is called."""
        return f"{self.method}-seed{self.seed}"


class Plan(msgspec.Struct, frozen=True):
    """What is compared: methods, each with the same seeds and everything else alike.

    Arguments:
        job: what all trainings share; its own method and seed are not used.
        methods: names from `snapcore.METHODS`, each once.
        seeds: each once.

    Raises:
        DataError: no method or seed, an unknown one, or one twice.
    """

    job: Job
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        unknown = [repr(name) for name in self.methods if name not in METHODS]
        if unknown:
            raise DataError(f"methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}")
        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise DataError(f"{name} must be one or more, each once, got {', '.join(map(str, values)) or 'none'}")

    def __iter__(self) -> Iterator[Cell]:
        """Seed by seed, so that what is trained first can be compared first."""
        return (Cell(method, seed) for seed in self.seeds for method in self.methods)

    def job_of(self, cell: Cell) -> Job:
        """Return a cell's own job."""
        return msgspec.structs.replace(self.job, method=cell.method, seed=cell.seed)

    def keep(self, directory: Path) -> None:
        """Keep what all trainings share, or compare it with what is kept there.

        Raises:
            StoreError: the directory holds another comparison, or a file that is not snapcore's.
        """
        path = directory / PLAN
        refuse_foreign(directory, [PLAN])
        ours = {name: value for name, value in msgspec.structs.asdict(self.job).items() if name not in _VARIED}
        if path.exists():
            kept = read_sealed(path)
            names = [name for name in ours if name not in MAY_DIFFER and kept.get(name) != ours[name]]
            if names == ["data_sha256"]:
                raise StoreError(
                    f"{directory} holds a comparison on other data than {self.job.data} has now: restore them, or "
                    "choose another --output"
                )
            if names:
                there, here = ({name: values.get(name) for name in names} for values in (kept, ours))
                raise StoreError(
                    f"{directory} holds a comparison with {there}, asked for {here}: ask for the same, or choose "
                    "another --output"
                )
            return
        write_sealed(path, ours)


def cell_directory(directory: Path, cell: Cell) -> Path:
    """Return where a comparison keeps a cell."""
    return directory / "cells" / cell.name


def finished(job: Job, directory: Path) -> dict[str, Any] | None:
    """Return the results of a cell that is done; None if it is not.

    They lie beside the cell: its own `results.json` is also what `snapcore evaluate` writes, of whatever it was asked.

    Raises:
        StoreError: another job's run is there, or the results are damaged.
    """
    if (directory / MANIFEST).exists():
        job.refuse_other(directory)
    return read_sealed(_record(directory)) if _record(directory).exists() else None


def _record(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.json")


def train_cell(job: dict[str, Any], directory: str, resume_every: int | None = None) -> dict[str, Any]:
    """Train a cell in whatever process this is, from its resume point if it has one, and return its results.

    Arguments:
        job: the cell's, as plain JSON, so that it travels.
        directory: the cell's own.
        resume_every: updates between two resume points.

    Raises:
        StoreError: this machine does not see the comparison's directory, or what is there cannot be resumed.
        DataError, ScheduleError, ProtocolError: the job cannot be run.
    """
    path = Path(directory)
    if not (path.parent.parent / PLAN).exists():
        raise StoreError(
            f"{path.parent.parent} is not seen by the worker on {socket.gethostname()}: give an --output that all "
            "machines share"
        )
    mine = msgspec.convert(job, Job)
    done = finished(mine, path)
    if done is not None:
        return done
    backend = start_backend(mine.backend)
    if (path / MANIFEST).exists() and not is_resumable(mine, path):
        results = evaluate([path], model=mine.model)  # it was trained, and stopped before this was written
    else:
        results = train(mine, backend, path, Display(Console(quiet=True)), resume_every=resume_every)
    write_sealed(_record(path), results)
    return results
