"""A run: the cursor, the store and the writer, moved together.

`Recorder` is the push form: a loop tells it of updates, it takes the snapshots that are due and hands back what
the loop itself must do (restarts). `execute` is the managed form: the same recorder, with a backend that trains
natively between two instructions.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from numpy.typing import NDArray

from snapcore.backend import Backend, Data, Pending, Report
from snapcore.errors import CycleWarning, DivergedError, ProtocolError, StoreError
from snapcore.protocol import Cursor, Event, Program, Restart, Snapshot, Stop, as_program
from snapcore.schedule import Schedule
from snapcore.store import SnapshotStore, move_aside
from snapcore.tensors import check_finite
from snapcore.writer import SnapshotWriter

Batch = TypeVar("Batch")
State = TypeVar("State")
Metrics = Mapping[str, float]
Tensors = Mapping[str, NDArray[Any]]


class Recorder:
    """Walk a program along real updates and keep its members in a run directory.

    Arguments:
        directory: the run's own; created if it is not there.
        schedule_or_program: what to walk.
        framework: recorded with every member.
        move_old_aside: rename a run that is already there instead of refusing it.

    Raises:
        StoreError: the directory already holds a run, is being written by another process, or cannot be written.
    """

    def __init__(
        self,
        directory: str | Path,
        schedule_or_program: Schedule | Program,
        *,
        framework: str,
        move_old_aside: bool = False,
    ) -> None:
        self.cursor = Cursor(schedule_or_program)
        self.program = as_program(schedule_or_program)
        self.directory = Path(directory)
        self._framework = framework
        if move_old_aside and (self.directory / "snapcore.json").exists():
            move_aside(self.directory)
        self.store = SnapshotStore(self.directory, "w")
        try:
            self._refuse_to_overwrite()
            self.store.describe(program=self.program.to_dict())
        except BaseException:
            self.store.close()
            raise
        self._writer = SnapshotWriter()
        self._closed = False

    def record(
        self,
        n: int,
        capture: Callable[[], Pending],
        *,
        late: Literal["raise", "take"] = "raise",
        metrics: Callable[[Snapshot], Metrics | None] | None = None,
    ) -> tuple[Event, ...]:
        """Move on by `n` updates that were done; take what is due.

        Arguments:
            n: updates since the last call, 0 or more.
            capture: gives a copy of the weights as they are now; called only if a snapshot is due.
            late: as in `Cursor.advance`; a late snapshot is warned of.
            metrics: gives what to record with a member.

        Returns:
            What was due, in order. The snapshot is already on its way; a `Restart` is the caller's to do.

        Raises:
            ProtocolError: as `Cursor.advance`.
            StoreError, DivergedError: an earlier member could not be written or was refused.
        """
        self._writer.check()
        events = self.cursor.advance(n, late=late)
        if events:
            self._take(events, capture, metrics)
        return events

    def finish(self, reason: str, capture: Callable[[], Pending]) -> tuple[Event, ...]:
        """End early with an unfinished member, if an update was done since the last one."""
        self._writer.check()
        events = self.cursor.finish(reason)
        self._take(events, capture, None)
        return events

    def first_member(self) -> Tensors:
        """Return the tensors of the run's first member, once they are on disk."""
        self._writer.drain()
        return self.store.load(1)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of `loader`, epoch after epoch, until the program stops.

        Raises:
            ProtocolError: the loader is empty, or a whole epoch passed without an update being recorded.
        """
        for epoch in itertools.count():
            if self.cursor.finished:
                return
            set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
            before, yielded = self.cursor.step, 0
            for batch in loader:
                yield batch
                yielded += 1
                if self.cursor.finished:
                    return
            if yielded == 0:
                raise ProtocolError("the loader gave no batch: it must be one that can be walked again every epoch")
            if self.cursor.step == before:
                raise ProtocolError(f"no update in {yielded} batches: call run.step() after every optimizer step")

    def close(self) -> None:
        """Wait for the writer, release the directory, and raise the writer's error if it has one."""
        if self._closed:
            return
        self._closed = True
        try:
            self._writer.close()
        finally:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_to_overwrite(self) -> None:
        store = self.store
        if store.program is None and not store.members:
            return
        held = f"{len(store.members)} members"
        state = f"a run that is {store.stopped} ({held})" if store.stopped else f"an unfinished run ({held})"
        raise StoreError(
            f"{self.directory} holds {state}: load it with SnapshotEnsemble.load, choose another directory, or pass "
            "resume=False, which moves it aside and starts anew"
        )

    def _take(
        self,
        events: tuple[Event, ...],
        capture: Callable[[], Pending],
        metrics: Callable[[Snapshot], Metrics | None] | None,
    ) -> None:
        for event in events:
            if isinstance(event, Snapshot):
                self._snapshot(event, capture, metrics(event) if metrics else None)
            elif isinstance(event, Stop):
                self._stop(event)

    def _snapshot(self, snapshot: Snapshot, capture: Callable[[], Pending], metrics: Metrics | None) -> None:
        self._writer.reserve()
        pending = capture()
        if snapshot.step != snapshot.due:
            delay = snapshot.step - snapshot.due
            warnings.warn(
                f"member {snapshot.index} was due after update {snapshot.due} and is taken {delay} updates late, "
                "at a rate that has jumped up: call run.step() after every optimizer step",
                CycleWarning,
                stacklevel=5,
            )

        def write() -> None:
            tensors = pending.resolve()
            check_finite(tensors, f"member {snapshot.index} at update {snapshot.step}")
            self.store.save(
                tensors,
                index=snapshot.index,
                step=snapshot.step,
                due=snapshot.due,
                cycle=snapshot.cycle,
                lr=snapshot.lr,
                framework=self._framework,
                unfinished=snapshot.unfinished,
                metrics=dict(metrics) if metrics else None,
            )

        self._writer.submit(write)

    def _stop(self, stop: Stop) -> None:
        expected = self.cursor.taken

        def write() -> None:
            if len(self.store.members) == expected:  # a member that could not be written leaves the run unfinished
                self.store.describe(stopped=stop.reason)

        self._writer.submit(write)


def execute(
    program: Program,
    backend: Backend[State],
    *,
    model: Any,
    data: Data,
    directory: str | Path,
    seed: int = 0,
    report: Report | None = None,
    metrics: Callable[[Snapshot, State], Metrics | None] | None = None,
    move_old_aside: bool = False,
    **options: Any,
) -> State:
    """Run a program to its end on a backend, keeping its members in `directory`.

    Each `Train` is one call of the backend's native loop. The same seed gives the same weights and batches.

    Arguments:
        program: a method as data, from `snapcore.program`.
        backend: from `load_backend`.
        model: whatever the backend's `init` takes: a built-in's name or a factory.
        data: examples, labels and their order, such as `TrainingData`.
        directory: the run's own.
        seed: of the weights; member k's fresh ones come from (seed, k).
        report: called as `report(step, loss)` for every update, in bulk now and then.
        metrics: called with each snapshot and the state it is of; what it returns is recorded with the member.
        move_old_aside: rename a run that is already there instead of refusing it.
        **options: go to the backend's `init`.

    Returns:
        The backend's state after the last update.

    Raises:
        DivergedError: a loss or a captured weight is not finite; the members before are kept.
        StoreError: the directory cannot be used.
    """

    def fresh(member: int) -> State:
        return backend.init(model, data, program, seed=seed, member=member, **options)

    checked = _refuse_divergence(report)
    with Recorder(directory, program, framework=backend.name, move_old_aside=move_old_aside) as recorder:
        state = fresh(1)
        cursor = recorder.cursor
        while not cursor.finished:
            state = backend.train(state, cursor.step, cursor.step + cursor.until_next, report=checked)
            for event in _record(recorder, backend, state, metrics):
                if isinstance(event, Restart):
                    source = restart_weights(event, recorder, lambda k: backend.capture(fresh(k)).resolve())
                    state = backend.restore(state, source, optimizer=event.optimizer)
        return state


def _record(
    recorder: Recorder,
    backend: Backend[State],
    state: State,
    metrics: Callable[[Snapshot, State], Metrics | None] | None,
) -> tuple[Event, ...]:
    return recorder.record(
        recorder.cursor.until_next,
        lambda: backend.capture(state),
        metrics=(lambda snapshot: metrics(snapshot, state)) if metrics else None,
    )


def restart_weights(restart: Restart, recorder: Recorder, fresh: Callable[[int], Tensors]) -> Tensors | None:
    """Return the tensors to go on from; None means the weights as they are.

    Arguments:
        restart: what the recorder handed back.
        recorder: that recorder.
        fresh: gives new weights for a member number.
    """
    if restart.source == "previous":
        return None
    if restart.source == "first":
        return recorder.first_member()
    return fresh(recorder.cursor.taken + 1)


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
