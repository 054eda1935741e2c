"""What a run was asked to do, kept beside its members so that it can be evaluated and resumed."""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from numpy.typing import NDArray

from snapcore.backend import Backend
from snapcore.data import LOSSES, TrainingData
from snapcore.errors import DataError, ScheduleError, SnapcoreError, StoreError
from snapcore.lab.datasets import Dataset, load_data
from snapcore.lab.ours import JOB
from snapcore.lab.sealed import read_sealed, write_sealed
from snapcore.protocol import Program, program
from snapcore.schedule import StepDecay

Count = Annotated[int, msgspec.Meta(ge=1)]
Whole = Annotated[int, msgspec.Meta(ge=0)]

_SCHEDULE = ("lr_min", "warmup_steps", "remainder")
_BACKEND = ("optimizer", "momentum", "weight_decay", "clip_norm", "precision", "device")
_OF_THE_DATA = ("loss", "task", "data_sha256")
_OUTPUTS = {"classes": "classes", "labels": "labels", "values": "values", "gaussian": "means with ln variances"}
MAY_DIFFER = ("data_dir", "device")
"""Where the images lie, and what computes: a run that was moved is still that run."""


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training, as the command line describes it. What is None is left to the schedule, or to the backend.

    Arguments:
        backend: a name from `available_backends`.
        data: a name that `load_data` knows, or any name with `data_dir`.
        data_dir: a folder of IDX files, or of one `.npz` archive; or what else the data need.
        model: a built-in's name, or `package.module:function` of (input_shape, n_classes).
        method: a name from `snapcore.METHODS`.
        epochs: passes over the training images.
        cycles: M, one member each.
        lr: the rate every cycle starts at.
        lr_min: the rate a cosine cycle anneals towards.
        warmup_steps: updates of linear warm-up.
        remainder: `paper` or `even`, when cycles do not divide the updates.
        optimizer: `sgd` or `adamw`.
        momentum: of SGD.
        weight_decay: of the optimizer.
        clip_norm: the gradient's largest 2-norm.
        precision: what to compute in.
        device: where to compute.
        batch_size: images per update.
        seed: of the weights and of the batches' order.
        train_limit: keep the first so many training images.
        held_out: the share of them that is kept back, to choose and calibrate members on.
        loss: what to train with, one of `snapcore.data.LOSSES`; None for what the data ask for, until they are loaded.
        task: the kind of task that the loss is for.
        data_sha256: the digest of the images and labels, once they are loaded.

    Raises:
        DataError: a number for the optimizer is out of range, or the loss is none, or for another task.
    """

    backend: str
    data: str = "digits"
    data_dir: str | None = None
    model: str = "cnn"
    method: str = "snapshot"
    epochs: Count = 100
    cycles: Count = 5
    lr: float = 0.1
    lr_min: float | None = None
    warmup_steps: Whole | None = None
    remainder: str | None = None
    optimizer: str | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    precision: str | None = None
    device: str | None = None
    batch_size: Count = 64
    seed: Whole = 0
    train_limit: Count | None = None
    held_out: float | None = None
    loss: str | None = "cross-entropy"  # as in runs from before there were others
    task: str | None = "classes"
    data_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.loss is not None and self.loss not in LOSSES:
            raise DataError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.loss is not None and self.task != LOSSES[self.loss]:
            raise DataError(f"task must be {LOSSES[self.loss]} for loss {self.loss}, got {self.task!r}")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise DataError(f"momentum must be in 0..1, got {self.momentum}")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise DataError(f"{name} must be finite and not negative, got {value}")

    @property
    def has_own_model(self) -> bool:
        """Whether the model is a function that is imported by name, and so code of somebody's."""
        return ":" in self.model

    def dataset(self, directory: Path | None = None) -> Dataset:
        """Load the data, from `directory` instead of its own if given."""
        return load_data(
            self.data,
            directory or self.data_dir,
            loss=self.loss,
            train_limit=self.train_limit,
            held_out=self.held_out or 0.0,
            seed=self.seed,
        )

    def training_data(self, dataset: Dataset) -> TrainingData:
        """Return the training part in this job's order."""
        return _training_data(dataset, dataset.x_train, dataset.y_train, self.batch_size, self.seed)

    def program(self, data: TrainingData) -> Program:
        """Return the method over the budget of `epochs`."""
        options = {name: value for name in _SCHEDULE if (value := getattr(self, name)) is not None}
        steps = self.epochs * data.updates_per_epoch
        return plan(self.method, lr=self.lr, steps=steps, cycles=self.cycles, **options)

    def options(self, backend: Backend[Any]) -> dict[str, Any]:
        """Return what goes to the backend's `init` by name: what was given, and nothing else.

        Raises:
            DataError: the backend has no such option, or the optimizer does not.
        """
        given = {name: value for name in _BACKEND if (value := getattr(self, name)) is not None}
        parameters = inspect.signature(backend.init).parameters
        open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())  # it checks names itself
        lacking = [name for name in given if name not in parameters and not open_ended]
        if lacking:
            raise DataError(
                f"the backend {self.backend} has no {flags(lacking)}: leave that out, or choose another --backend"
            )
        if "momentum" in given and self.optimizer not in (None, "sgd"):
            raise DataError(f"--momentum is sgd's, got --optimizer {self.optimizer}: leave one of them out")
        return given

    def state(self, backend: Backend[Any], dataset: Dataset, program: Program) -> Any:
        """Return the backend's state with this job's model in it, to restore members into.

        Raises:
            DataError: the model cannot be built, or does not take the images and give what the task needs.
        """
        one = _training_data(dataset, dataset.x_train[:1], dataset.y_train[:1], 1)  # only its shape is needed
        options = self.options(backend)
        with self.errors_named():
            state = backend.init(self.resolved_model(), one, program, seed=self.seed, **options)
            if self.has_own_model:
                shape = tuple(backend.logits(state, dataset.x_test[:2]).shape)
                wanted = (len(dataset.x_test[:2]), *dataset.positions, one.n_outputs)
                if shape != wanted:
                    what = " and ".join(
                        [f"{dataset.noun}s", *(["pixels"] if dataset.positions else []), _OUTPUTS[dataset.kind]]
                    )
                    raise ValueError(f"its output must have shape {wanted}, {what}, got {shape}")
        return state

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Turn what a model of the user's own raises into one line that names it; a built-in's errors are ours."""
        if not self.has_own_model:
            yield
            return
        try:
            yield
        except SnapcoreError:
            raise
        except Exception as error:  # a user's code may raise any class, its own too; it goes on as the cause of ours
            cause, *_ = [*str(error).splitlines(), ""]
            raise DataError(
                f"--model {self.model} does not fit: {type(error).__name__}: {cause}; correct it"
            ) from error

    def resolved_model(self) -> str | Callable[..., Any]:
        """Return what the backend's `init` takes: a built-in's name, or the function named.

        Raises:
            DataError: the name leads to no function.
        """
        if not self.has_own_model:
            return self.model
        module, _, name = self.model.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: an empty or relative name
            cure = "give package.module:function, with the package installed or its folder on PYTHONPATH"
            raise DataError(f"--model {self.model}: {error}; {cure}") from error
        if not callable(function):
            raise DataError(f"--model {self.model} must name a function of (input_shape, n_outputs), got {function!r}")
        return function  # type: ignore[no-any-return]

    def save(self, directory: Path) -> None:
        """Keep the job in a run directory.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            write_sealed(directory / JOB, msgspec.structs.asdict(self))
        except OSError as error:
            raise StoreError(f"{directory} cannot be written: {error}; choose another --output") from error

    def differing(self, other: "Job") -> list[str]:
        """Return the names of what is not the same in another job; what is not known before the data is the same."""
        names = [name for name in self.__struct_fields__ if getattr(self, name) != getattr(other, name)]
        return [name for name in names if name not in _OF_THE_DATA or getattr(self, name) is not None]

    def refuse_other(self, directory: Path) -> dict[str, Any]:
        """Raise `StoreError` unless this is the job kept in a run directory; return what may differ and does.

        Returns:
            The values that the run was begun with, by name.
        """
        other = load_job(directory)
        names = self.differing(other)
        binding = [name for name in names if name not in MAY_DIFFER]
        if binding == ["data_sha256"]:
            raise StoreError(
                f"{directory} holds a run on other images than {self.data} has now: restore them, choose another "
                "--output, or pass --no-resume, which moves it aside"
            )
        if binding:
            there, here = ({name: getattr(job, name) for name in binding} for job in (other, self))
            raise StoreError(
                f"{directory} holds a run with {there}, asked for {here}: ask for the same to resume it, choose "
                "another --output, or pass --no-resume, which moves it aside"
            )
        return {name: getattr(other, name) for name in names}


def _training_data(dataset: Dataset, x: NDArray[Any], y: NDArray[Any], batch_size: int, seed: int = 0) -> TrainingData:
    return TrainingData(x, y, dataset.n_classes, batch_size, seed, loss=dataset.loss, ignore=dataset.ignore)


def load_job(directory: Path) -> Job:
    """Return the job kept in a run directory.

    Raises:
        StoreError: there is none, it cannot be read, or it is damaged.
    """
    path = directory / JOB
    try:
        return msgspec.convert(read_sealed(path), Job)
    except FileNotFoundError:
        raise StoreError(f"{directory} holds no {JOB}: snapcore train did not make it; choose another") from None
    except msgspec.ValidationError as error:
        raise StoreError(f"{path} is damaged: {error}; restore it, or move {directory} away") from error


def plan(method: str, *, lr: float, steps: int, cycles: int, **options: Any) -> Program:
    """Return a method as a program, `options` being those of its cosine cycles.

    Raises:
        ScheduleError: the method has none, or values describe no schedule.
    """
    if options and isinstance(program(method, lr=lr, steps=steps, cycles=1).schedule, StepDecay):
        raise ScheduleError(
            f"{method} has no cosine cycles, got {flags(options)}: leave that out, or choose another --method"
        )
    return program(method, lr=lr, steps=steps, cycles=cycles, **options)


def flags(names: Iterable[str]) -> str:
    """Return arguments' names as the command line spells them."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
