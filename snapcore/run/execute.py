"""The managed form of a run: a program, a backend that trains natively, and a recorder between them."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from snapcore.backend import Backend, Data, Pending, Report
from snapcore.errors import DivergedError
from snapcore.protocol import OptimizerState, Program, Snapshot
from snapcore.run.group import Alone, Group
from snapcore.run.recorder import Recorder
from snapcore.store import Tensors

State = TypeVar("State")
Measure = Callable[[Snapshot, State], Mapping[str, float] | None]

SLICE = 50  # updates in the first call of the native loop
_SHORT, _LONG = 0.5, 2.0  # seconds that a call may take before the next is made longer, or shorter


def execute(
    program: Program,
    backend: Backend[State],
    *,
    model: Any,
    data: Data,
    directory: str | Path,
    seed: int = 0,
    report: Report | None = None,
    metrics: Measure[State] | None = None,
    resume: bool = True,
    resume_every: int | None = None,
    before_point: Callable[[], None] | None = None,
    group: Group | None = None,
    **options: Any,
) -> State:
    """Run a program to its end on a backend, keeping its members in `directory`.

    Training is the backend's native loop, which comes back about once a second. The same seed gives the same weights
    and batches; a run that was killed and is executed again resumes from its resume point, and its members are those
    of a run that was never stopped.

    Arguments:
        program: a method as data, from `snapcore.program`.
        backend: from `load_backend`.
        model: whatever the backend's `init` takes: a built-in's name or a factory.
        data: examples, labels and their order, such as `TrainingData`.
        directory: the run's own.
        seed: of the weights; member k's fresh ones come from (seed, k).
        report: called as `report(step, loss)` for every update, in bulk now and then.
        metrics: called with each snapshot and the state it is of; what it returns is recorded with the member.
        resume: resume an unfinished run that is there; False moves any run aside.
        resume_every: updates between two resume points, beside those at every cycle's end.
        before_point: called before every resume point.
        group: the processes that train together.
        **options: go to the backend's `init`.

    Returns:
        The backend's state after the last update.

    Raises:
        DivergedError: a loss or a captured weight is not finite; the members before are kept.
        StoreError: the directory cannot be used.
        SystemExit: with code 143, after a SIGTERM and its resume point.
    """
    checked = _refuse_divergence(report)
    managed = _Managed(backend, lambda member: backend.init(model, data, program, seed=seed, member=member, **options))
    with Recorder(
        directory,
        program,
        managed,
        framework=backend.name,
        resume=resume,
        resume_every=resume_every,
        before_point=before_point,
        group=group,
    ) as recorder:
        pace = _Pace(recorder, resume_every, group or Alone())
        managed.state = managed.make(1)
        recorder.start()
        while not recorder.cursor.finished:
            start, stop = pace.next_slice()
            managed.state = backend.train(managed.state, start, stop, report=checked)
            recorder.record(stop - start, metrics=managed.measured_by(metrics))
    return managed.state


class _Managed(Generic[State]):
    """A backend and its state: what is trained, as the recorder sees it."""

    def __init__(self, backend: Backend[State], make: Callable[[int], State]) -> None:
        self._backend, self.make = backend, make
        self.state: State

    def fresh(self, member: int) -> Pending | Tensors:
        return self._backend.capture(self.make(member))

    def capture(self) -> Pending | Tensors:
        return self._backend.capture(self.state)

    def restore(self, tensors: Tensors | None, *, optimizer: OptimizerState) -> None:
        self.state = self._backend.restore(self.state, tensors, optimizer=optimizer)

    def dump(self) -> tuple[Pending | Tensors, dict[str, Any]]:
        return self._backend.dump(self.state)

    def load(self, tensors: Tensors, values: dict[str, Any]) -> None:
        self.state = self._backend.load(self.state, tensors, values)

    def random_state(self) -> None:
        """Nothing: a backend's dump holds its own."""

    def set_random_state(self, state: Any) -> None:
        """Nothing to set."""

    def measured_by(self, metrics: Measure[State] | None) -> Callable[[Snapshot], Mapping[str, float] | None] | None:
        return None if metrics is None else lambda snapshot: metrics(snapshot, self.state)


class _Pace:
    """How far the native loop goes before it comes back: about a second, to a boundary, or to a resume point.

    Several processes go as far as process 0 does, whatever their own clocks say.
    """

    def __init__(self, recorder: Recorder, resume_every: int | None, group: Group) -> None:
        self._cursor, self._every, self._group = recorder.cursor, resume_every, group
        self._updates, self._began = SLICE, math.nan

    def next_slice(self) -> tuple[int, int]:
        now = time.monotonic()
        if now - self._began < _SHORT:
            self._updates *= 2
        elif now - self._began > _LONG:
            self._updates = max(self._updates // 2, SLICE)
        self._began = now
        self._updates = self._group.gather(self._updates)[0]
        start = self._cursor.step
        stop = start + min(self._updates, self._cursor.until_next)
        return start, stop if self._every is None else min(stop, (start // self._every + 1) * self._every)


def _refuse_divergence(report: Report | None) -> Report:
    def checked(step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of update {step} is {loss}; the members taken before are kept. Lower the learning rate, "
                "warm it up, or clip gradients"
            )
        if report is not None:
            report(step, loss)

    return checked
