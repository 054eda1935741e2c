"""Trainings under a run, seen from outside: they are begun as a new process would, watched, left and killed."""

import functools
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from snapcore.errors import CorruptSnapshotError
from snapcore.protocol import Program, Restart, as_program
from snapcore.schedule import CosineCycles, Schedule
from snapcore.store import SnapshotStore, read_point
from snapcore.testing.arrays import Arrays, assert_all_equal, frozen

Act = Callable[[int, Any], None]

CYCLES = CosineCycles(0.1, 13, 3, warmup_steps=2, remainder="even")
"""Members are due after 6, 10 and 13 updates: the first cycle begins late, and the last one is shorter."""
STAR = Program("star", CYCLES, Restart("first", "reset"))
KEEP = Program("keep", CYCLES, Restart("first", "keep"))
FRESH = Program("singlecycle", CYCLES, Restart("fresh", "reset"))
X: NDArray[np.float32] = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)
"""What an update takes, and what an ensemble is asked about."""


class Stopped(Exception):  # noqa: N818 - it stands for the end of a process, which is no error
    """Ends a training from within."""


@dataclass
class Training:
    """What one process has done, update by update."""

    rates: list[float] = field(default_factory=list)
    """That of each update, as the optimizer had it."""
    before: list[Arrays] = field(default_factory=list)
    """The weights that each update began with."""
    after: list[Arrays] = field(default_factory=list)
    """The weights that each update led to."""
    moments_before: list[list[NDArray[Any]]] = field(default_factory=list)
    """The optimizer's moments that each update began with."""
    moments_after: list[list[NDArray[Any]]] = field(default_factory=list)
    """The optimizer's moments that each update led to."""


class Trainings:
    """The verbs that a suite overrides for its framework, and the trainings that its rules look at."""

    framework: ClassVar[str]
    cycles: ClassVar[Schedule] = CYCLES
    x: ClassVar[NDArray[np.float32]] = X
    patience: ClassVar[float] = 10.0

    def new(self, seed: int, schedule: Schedule) -> Any:
        """Return a subject as a new process makes it, its weights and random states drawn from the seed."""
        raise NotImplementedError

    def train(
        self,
        directory: Path,
        cycles: Schedule | Program,
        subject: Any,
        *,
        before: Callable[[], None],
        after: Callable[[], bool],
        **options: Any,
    ) -> None:
        """Train under a run in `directory` until the program stops.

        Arguments:
            directory: the run's own.
            cycles: what it walks.
            subject: what it trains.
            before: to be called before every update.
            after: to be called after every update, before the run hears of it; what it raises is not caught. If it
                returns True, training is left as one leaves it early, once the run has heard of the update.
            options: for the run: `resume`, `resume_every`, `init`.
        """
        raise NotImplementedError

    def init(self, seed: int, schedule: Schedule) -> Any:
        """Return the weights of `new(seed, schedule)` in the form in which `init=` gives them."""
        raise NotImplementedError

    def weights(self, subject: Any) -> Arrays:
        """Return all that the forward pass needs, buffers too, by the names of a member."""
        raise NotImplementedError

    def moments(self, subject: Any) -> list[NDArray[Any]]:
        """Return the optimizer's moments; of a new optimizer all are zero, or there are none."""
        raise NotImplementedError

    def rate(self, subject: Any) -> float:
        """Return the rate of the next update, as the optimizer has it."""
        raise NotImplementedError

    def spoil(self, subject: Any) -> None:
        """Make one of the weights NaN."""
        raise NotImplementedError

    def ensemble(self, directory: Path, x: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return what an ensemble of the directory gives for `x`: the mean of its members, and each of them."""
        raise NotImplementedError

    @classmethod
    @functools.cache
    def _undisturbed(cls, cycles: Schedule | Program = CYCLES) -> "_Undisturbed":
        """Return a training that was never stopped, and what it has left; done once for a suite."""
        with tempfile.TemporaryDirectory() as folder:
            training, store = cls()._train(Path(folder) / "run", cycles), SnapshotStore(Path(folder) / "run")
            tensors = [frozen(store.load(member.index)) for member in store.members]
            return _Undisturbed(training, store.members, tensors, store.stopped)

    def _train(
        self,
        directory: Path,
        cycles: Schedule | Program = CYCLES,
        *,
        seed: int = 0,
        leave_after: int | None = None,
        act: Act | None = None,
        **options: Any,
    ) -> Training:
        """Train as a new process would, and return what was seen.

        Arguments:
            directory: the run's own.
            cycles: what it walks.
            seed: of weights and random states; what resumes is begun with another.
            leave_after: updates of this process after which to leave early.
            act: called after every update with their number and the subject.
            options: for the run.
        """
        random.seed(seed)
        np.random.seed(seed)
        program = as_program(cycles)
        if program.between.source == "fresh":
            options.setdefault("init", self._fresh)
        subject, training = self.new(seed, program.schedule), Training()

        def before() -> None:
            training.rates.append(float(self.rate(subject)))
            training.before.append(frozen(self.weights(subject)))
            training.moments_before.append([np.array(each) for each in self.moments(subject)])

        def after() -> bool:
            training.after.append(frozen(self.weights(subject)))
            training.moments_after.append([np.array(each) for each in self.moments(subject)])
            if act is not None:
                act(len(training.after), subject)
            return len(training.after) == leave_after

        self.train(directory, cycles, subject, before=before, after=after, **options)
        return training

    def _killed(
        self, directory: Path, cycles: Schedule | Program = CYCLES, *, update: int, point: int, **options: Any
    ) -> Path:
        """Return a copy of the directory of a training as it is in that update, once its resume point is on disk."""
        left = directory.with_name(f"{directory.name} killed")

        def act(done: int, subject: Any) -> None:  # noqa: ARG001
            if done == update:
                self._wait(directory, point)
                # What is being written now may have another name before it is copied.
                shutil.copytree(directory, left, ignore=shutil.ignore_patterns(".tmp*"))
                raise Stopped

        with suppress(Stopped):
            self._train(directory, cycles, act=act, **options)
        return left

    def _fresh(self, number: int) -> Any:
        return self.init(100 + number, CYCLES)

    def _wait(self, directory: Path, step: int) -> None:
        """Wait until the resume point of that update is on disk, and all members up to it."""
        due, end = [each for each in CYCLES.snapshot_steps if each <= step], time.monotonic() + self.patience
        while time.monotonic() < end:
            with suppress(CorruptSnapshotError):  # it was replaced while it was read
                if (steps(directory), point_at(directory)) == (due, step):
                    return
            time.sleep(0.002)

    def _assert_resumes(self, directory: Path, step: int) -> None:
        """Assert that a new process does the updates after `step`, and each of them as if it had never been stopped."""
        assert_all_equal(self._train(directory, seed=1).after, self._undisturbed().training.after[step:])


@dataclass(frozen=True)
class _Undisturbed:
    training: Training
    members: tuple[Any, ...]
    tensors: list[Arrays]
    stopped: str | None

    @property
    def steps(self) -> list[int]:
        return [member.step for member in self.members]


def steps(directory: Path) -> list[int]:
    """Return after how many updates the members were taken."""
    return [member.step for member in SnapshotStore(directory).members]


def point_at(directory: Path) -> int | None:
    """Return after how many updates the resume point was taken; None if there is none."""
    point = read_point(directory)
    return None if point is None else int(point.state["place"]["step"])
