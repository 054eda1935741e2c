"""What a run was asked to do, kept beside its members so that it can be evaluated and resumed."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from snapcore.backend import Backend, available_backends, load_backend
from snapcore.data import TrainingData
from snapcore.errors import BackendNotFoundError, DataError, StoreError
from snapcore.lab.datasets import Dataset, load_data
from snapcore.protocol import Program, program
from snapcore.store import atomic_write

Count = Annotated[int, msgspec.Meta(ge=1)]

FILE = "job.json"
_PREFERRED = ("torch", "jax", "tensorflow", "keras")


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training, as the command line describes it.

    Arguments:
        backend: a name from `available_backends`.
        data: `digits`, `fashion-mnist`, or any name with `data_dir`.
        data_dir: a folder of IDX files, or of one `.npz` archive.
        model: a built-in's name, or `package.module:function` of (input_shape, n_classes).
        method: a name from `snapcore.METHODS`.
        epochs: passes over the training images.
        cycles: M, one member each.
        lr: the rate every cycle starts at.
        batch_size: images per update.
        seed: of the weights and of the batches' order.
        train_limit: keep the first so many training images.
    """

    backend: str
    data: str = "digits"
    data_dir: str | None = None
    model: str = "cnn"
    method: str = "snapshot"
    epochs: Count = 100
    cycles: Count = 5
    lr: float = 0.1
    batch_size: Count = 64
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    train_limit: Count | None = None

    def dataset(self) -> Dataset:
        """Load the data."""
        return load_data(self.data, self.data_dir, train_limit=self.train_limit)

    def training_data(self, dataset: Dataset) -> TrainingData:
        """Return the training part in this job's order."""
        return TrainingData(dataset.x_train, dataset.y_train, dataset.n_classes, self.batch_size, self.seed)

    def program(self, data: TrainingData) -> Program:
        """Return the method over the budget of `epochs`."""
        return program(self.method, lr=self.lr, steps=self.epochs * data.updates_per_epoch, cycles=self.cycles)

    def state(self, backend: Backend[Any], dataset: Dataset, program: Program) -> Any:
        """Return the backend's state with this job's model in it, to restore members into."""
        one = TrainingData(dataset.x_train[:1], dataset.y_train[:1], dataset.n_classes, 1)  # only its shape is needed
        return backend.init(self.resolved_model(), one, program, seed=self.seed)

    def resolved_model(self) -> str | Callable[..., Any]:
        """Return what the backend's `init` takes: a built-in's name, or the function named.

        Raises:
            DataError: the name leads to no function.
        """
        if ":" not in self.model:
            return self.model
        module, _, name = self.model.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: an empty or relative name
            cure = "give package.module:function, with the package installed or its folder on PYTHONPATH"
            raise DataError(f"--model {self.model}: {error}; {cure}") from error
        if not callable(function):
            raise DataError(f"--model {self.model} must name a function of (input_shape, n_classes), got {function!r}")
        return function  # type: ignore[no-any-return]

    def save(self, directory: Path) -> None:
        """Keep the job in a run directory.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with atomic_write(directory / FILE) as temporary:
                temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self)) + b"\n")
        except OSError as error:
            raise StoreError(f"{directory} cannot be written: {error}; choose another --output") from error

    def refuse_other(self, directory: Path) -> None:
        """Raise `StoreError` unless this is the job kept in a run directory, saying what differs."""
        other = load_job(directory)
        names = [name for name in self.__struct_fields__ if getattr(self, name) != getattr(other, name)]
        if names:
            there, here = ({name: getattr(job, name) for name in names} for job in (other, self))
            raise StoreError(
                f"{directory} holds a run with {there}, asked for {here}: ask for the same to resume it, choose "
                "another --output, or pass --no-resume, which moves it aside"
            )


def load_job(directory: Path) -> Job:
    """Return the job kept in a run directory.

    Raises:
        StoreError: there is none, it cannot be read, or it is damaged.
    """
    path = directory / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Job)
    except FileNotFoundError:
        raise StoreError(f"{directory} holds no {FILE}: snapcore train did not make it; choose another") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; choose another directory") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged: {error}; restore it, or move {directory} away") from error


def first_backend() -> tuple[str, Backend[Any]]:
    """Return the first backend whose framework is installed.

    Raises:
        BackendNotFoundError: none is; the message says what to install.
    """
    found = sorted(available_backends())
    ordered = [*(n for n in _PREFERRED if n in found), *(n for n in found if n not in _PREFERRED)]
    for name in ordered:
        try:
            return name, load_backend(name)
        except BackendNotFoundError:
            continue
    raise BackendNotFoundError("no framework is installed: pip install 'snapcore[torch]'")
