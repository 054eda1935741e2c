"""The push form of a run: a loop tells it of updates, and it does what is due.

It moves the cursor, the store, the writer and the resume point together. All that takes time happens in the
writer's thread; what the loop waits for is the copy.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

from snapcore.backend import Pending, resolved
from snapcore.errors import CycleWarning, ProtocolError, SnapcoreError, StoreError
from snapcore.protocol import FINISHED, NOTHING, Cursor, Event, Program, Restart, Snapshot, Stop, as_program
from snapcore.run.background import SnapshotWriter
from snapcore.run.batches import Epochs
from snapcore.run.group import Alone, Group
from snapcore.run.random_state import random_state, set_random_state
from snapcore.run.resume import Opening
from snapcore.run.sigterm import Termination
from snapcore.run.trainer import Place
from snapcore.schedule import Schedule
from snapcore.store import (
    ResumePoint,
    SnapshotStore,
    Tensors,
    check_finite,
    clear_point,
    new_member,
    read_point,
    write_point,
)

Batch = TypeVar("Batch")
Measure = Callable[[Snapshot], Mapping[str, float] | None]

WEIGHTS = "weights/"
AGREE_EVERY = 50
"""Updates between two moments at which several processes agree whether one of them was told to end."""

log = logging.getLogger("snapcore")


class Source(Protocol):
    """What is being trained, as the recorder sees it."""

    def capture(self) -> Pending | Tensors:
        """Return a copy of the weights that later updates cannot change."""
        ...

    def dump(self) -> tuple[Pending | Tensors, dict[str, Any]] | None:
        """Return a copy of all that training needs to go on, or None if it cannot be resumed.

        The weights of `capture` are in it, their names after `weights/`.
        """
        ...

    def load(self, tensors: Tensors, values: dict[str, Any]) -> None:
        """Go on from what `dump` returned."""
        ...

    def random_state(self) -> Any:
        """Return the framework's own random states as plain JSON."""
        ...

    def set_random_state(self, state: Any) -> None:
        """Take them back."""
        ...


class Recorder:
    """Walk a program along real updates; keep its members and its resume point in a run directory.

    Arguments:
        directory: the run's own; created if it is not there.
        schedule_or_program: what to walk.
        source: what is being trained.
        framework: recorded with every member.
        resume: go on with an unfinished run that is there; False moves any run aside.
        resume_every: updates between two resume points, beside those at every cycle's end.
        before_point: called before every resume point, to bring what belongs to it up to date.
        group: the processes that train together; number 0 writes, and all must see its directory.
        at: where a trainer that keeps checkpoints of its own begins or goes on, from `place`. Resume points and
            SIGTERM are left to it. Members taken after that place are forgotten, to be taken again.

    Raises:
        StoreError: the directory holds a finished run, another program's, or one that cannot be resumed; does not
            hold the members that `at` counts; is being written by another process; or cannot be written.
        CorruptSnapshotError: what is there is not what was written.
    """

    def __init__(
        self,
        directory: str | Path,
        schedule_or_program: Schedule | Program,
        source: Source,
        *,
        framework: str,
        resume: bool = True,
        resume_every: int | None = None,
        before_point: Callable[[], None] | None = None,
        group: Group | None = None,
        at: Place | None = None,
    ) -> None:
        if resume_every is not None and resume_every < 1:
            raise ProtocolError(f"resume_every counts updates, 1 or more; got {resume_every}")
        self.directory = Path(directory)
        self.program = as_program(schedule_or_program)
        self.cursor = Cursor(self.program)
        self.epochs = Epochs(self.cursor, self._random_state, self._set_random_state)
        self._source, self._framework, self._every = source, framework, resume_every
        self._before_point, self._group = before_point, group or Alone()
        self._at, self._leads = at, self._group.rank == 0
        self._agrees = self._group.size > 1 and at is None
        self._failed = self._closed = False
        self._point_at = 0
        self._open(resume)
        self._writer = SnapshotWriter()
        self._termination = Termination(listen=at is None)

    def start(self) -> tuple[Event, ...]:
        """Go on where the run stopped, if it did; call it once, before the first update.

        Returns:
            What is still to be done at this place: the restart that follows a member, or nothing.

        Raises:
            DataError: the resume point cannot be read or does not fit.
        """
        if self._at is not None:
            return self._start_at(self._at)
        point = read_point(self.directory)
        if point is None:
            return ()
        self.cursor.load_state_dict(point.state["place"])
        self._point_at = self.cursor.step
        weights = {} if point.member is None else self._member_weights(point.member.index)
        self._source.load({**point.tensors, **weights}, point.state["values"])
        processes = point.state["processes"]
        own = processes[self._group.rank if len(processes) == self._group.size else 0]
        self.epochs.load_state_dict(own["data"])
        self._set_random_state(own["random"])
        log.info("%s goes on after update %d of %d", self.directory, self.cursor.step, self.program.updates)
        between = self.program.between
        return (between,) if self.cursor.at_member and between != NOTHING else ()

    def record(
        self, n: int, *, late: Literal["raise", "take"] = "raise", metrics: Measure | None = None
    ) -> tuple[Event, ...]:
        """Move on by `n` updates that were done; take what is due.

        Arguments:
            n: updates since the last call, 0 or more.
            late: as in `Cursor.advance`; a late snapshot is warned of.
            metrics: gives what to record with a member.

        Returns:
            What was due, in order. The snapshot is already on its way; a `Restart` is the caller's to do.

        Raises:
            ProtocolError: as `Cursor.advance`, or an earlier member could not be written and this run cannot go on.
            StoreError, DivergedError: an earlier member could not be written or was refused.
            SystemExit: with code 143, after a SIGTERM and its resume point.
        """
        self._check()
        before = self.cursor.step
        if n:
            self.epochs.settle()
        if 0 <= n < self.cursor.until_next:
            events = self.cursor.advance(n)
        else:
            events = self._arrive(lambda: self.cursor.advance(n, late=late), metrics)
        if self._every and not events and self.cursor.step // self._every != before // self._every:
            self._save_point()
        if self._termination.received or self._agrees:
            self._leave_if_told(before)
        return events

    def finish(self, reason: str) -> tuple[Event, ...]:
        """End early with an unfinished member, if an update was done since the last one."""
        self._check()
        return self._arrive(lambda: self.cursor.finish(reason), None)

    def first_member(self) -> Tensors:
        """Return the tensors of the run's first member, once they are on disk."""
        self._writer.drain()
        self._group.gather(None)
        return SnapshotStore(self.directory).load(1)

    @property
    def store(self) -> SnapshotStore:
        """The run directory, open to write; process 0's alone."""
        if self._store is None:
            raise ProtocolError("only process 0 writes the run directory")
        return self._store

    def place(self) -> Place:
        """Return where the run is, for a trainer's own checkpoint, once the members before it are on disk.

        Raises:
            StoreError, DivergedError, ProtocolError: a member could not be written or was refused.
        """
        self._check()
        self._writer.drain()
        members = () if self._store is None else self._store.members
        return Place(self.cursor.step, tuple(member.sha256 for member in members))

    @property
    def failed(self) -> bool:
        """Whether a member could not be written: nothing is any more, and the run cannot go on."""
        return self._failed

    @property
    def told_to_end(self) -> bool:
        """Whether a SIGTERM has come; the next update recorded answers it."""
        return self._termination.received

    def batches(self, loader: Iterable[Batch], *, places_itself: bool = False) -> Iterator[Batch]:
        """Yield the loader's batches until the program stops; after a resume, go on where it was.

        See `Epochs.walk`.
        """
        return self.epochs.walk(loader, places_itself=places_itself)

    def close(self, *, exact: bool = True) -> None:
        """Wait for the writer, release the directory, and raise the writer's error if it has one.

        Arguments:
            exact: whether the source is as the last update left it, so that a run left early may go on from here.

        Raises:
            StoreError, DivergedError: a member or the resume point could not be written or was refused.
            SystemExit: with code 143, after a SIGTERM that no update has answered.
        """
        if self._closed:
            return
        self._closed = True
        early = not self.cursor.finished and not self._failed
        try:
            try:
                if early and exact and self.cursor.step > self._point_at:
                    self._save_point()
            finally:
                self._writer.close()  # nothing is written any more once the directory is another's
            if early:
                self._say_where_it_was_left()
        finally:
            self._termination.remove()
            if self._store is not None:
                self._store.close()
        if exact and self._termination.received:
            self._termination.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error may have come in the middle of an update, with half of the weights moved.
        self.close(exact=kind is None)

    def _open(self, resume: bool) -> None:
        self._store: SnapshotStore | None = None
        refusal: SnapcoreError | None = None
        if self._leads:
            try:
                self._store = Opening(self.directory, self.program, self._framework, self._at).store(resume=resume)
            except SnapcoreError as error:
                refusal = error
        told = self._group.gather(None if refusal is None else str(refusal))[0]
        if refusal is not None:
            raise refusal
        if told is not None:
            raise StoreError(told)

    def _start_at(self, at: Place) -> tuple[Event, ...]:
        members = SnapshotStore(self.directory).members[: len(at.members)]  # process 0 may be adding one already
        last = members[-1].step if members else 0
        stopped = FINISHED if last == self.program.updates else None
        self.cursor.load_state_dict({"step": last, "taken": len(members), "last": last, "stopped": stopped})
        if at.step:
            log.info("%s goes on after update %d of %d", self.directory, at.step, self.program.updates)
        # What is due at this very place was not taken before the checkpoint, which has the weights for it.
        return self.record(at.step - last, late="take")

    def _check(self) -> None:
        self._writer.check()
        if self._failed:
            self._writer.drain()  # the error itself, if the writer's thread was just about to tell it
            raise ProtocolError(
                f"a member of {self.directory} could not be written, and this run cannot go on without it: start "
                "again, and it goes on from the resume point before"
            )

    def _arrive(self, move: Callable[[], tuple[Event, ...]], metrics: Measure | None) -> tuple[Event, ...]:
        before = self.cursor.state_dict()
        events = move()
        try:
            self._take(events, metrics)
        except BaseException:
            self.cursor.load_state_dict(before)
            raise
        return events

    def _take(self, events: tuple[Event, ...], metrics: Measure | None) -> None:
        snapshot = next((event for event in events if isinstance(event, Snapshot)), None)
        stop = next((event for event in events if isinstance(event, Stop)), None)
        if snapshot is not None:
            _warn_if_late(snapshot)
            values = metrics(snapshot) if metrics else None
            self._writer.reserve()
            copy, state = self._copy(resumable=stop is None)
            self._submit(lambda: self._write_member(snapshot, values, copy, state, stop))
        elif stop is not None:
            self._submit(lambda: self._write_stop(stop))
        if stop is not None and not self._termination.received:
            self._termination.remove()

    def _copy(self, *, resumable: bool) -> tuple[Pending | Tensors, dict[str, Any] | None]:
        if not resumable or self._at is not None:
            return self._source.capture(), None
        if self._before_point is not None:
            self._before_point()
        own = {"random": self._random_state(), "data": self.epochs.state_dict()}
        processes = self._group.gather(own)
        dumped = self._source.dump()
        if dumped is None:
            return self._source.capture(), None
        tensors, values = dumped
        self._point_at = self.cursor.step
        return tensors, {
            "framework": self._framework,
            "place": self.cursor.state_dict(),
            "values": values,
            "processes": processes,
        }

    def _save_point(self) -> None:
        if self._at is not None:
            return
        self._writer.reserve()
        copy, state = self._copy(resumable=True)
        if state is not None:
            self._submit(lambda: self._write_point(copy, state))

    def _submit(self, job: Callable[[], None]) -> None:
        if self._leads:
            self._writer.submit(lambda: self._write(job))

    def _write(self, job: Callable[[], None]) -> None:
        """Do a job of the writer's thread, unless one before has failed: a point would count a member that is not."""
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise

    def _write_member(
        self,
        snapshot: Snapshot,
        metrics: Mapping[str, float] | None,
        copy: Pending | Tensors,
        state: dict[str, Any] | None,
        stop: Stop | None,
    ) -> None:
        tensors = resolved(copy)
        weights = tensors if state is None else _weights(tensors)
        check_finite(weights, f"member {snapshot.index} at update {snapshot.step}")
        member = new_member(**asdict(snapshot), framework=self._framework, metrics=metrics)
        member = self.store.put(weights, member)
        if state is not None:
            rest = {name: array for name, array in tensors.items() if not name.startswith(WEIGHTS)}
            write_point(self.directory, ResumePoint(rest, state, member))
        # Last: a member in the manifest is never newer than the resume point.
        self.store.add(member, stopped=None if stop is None else stop.reason)
        if stop is not None:
            clear_point(self.directory)

    def _write_point(self, copy: Pending | Tensors, state: dict[str, Any]) -> None:
        tensors = resolved(copy)
        check_finite(_weights(tensors), f"the resume point at update {state['place']['step']}")
        write_point(self.directory, ResumePoint(tensors, state))

    def _write_stop(self, stop: Stop) -> None:
        self.store.describe(stopped=stop.reason)
        clear_point(self.directory)

    def _member_weights(self, index: int) -> Tensors:
        return {WEIGHTS + name: array for name, array in SnapshotStore(self.directory).load(index).items()}

    def _random_state(self) -> dict[str, Any]:
        return {**random_state(), "framework": self._source.random_state()}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        set_random_state(state)
        self._source.set_random_state(state["framework"])

    def _leave_if_told(self, before: int) -> None:
        if self.cursor.step == before:
            return
        received = self._termination.received
        if self._group.size > 1:
            if self.cursor.step // AGREE_EVERY == before // AGREE_EVERY and not self.cursor.finished:
                return
            received = any(self._group.gather(received))
        if received:
            self.close()
            self._termination.leave()

    def _say_where_it_was_left(self) -> None:
        place = f"{self.cursor.step} of {self.program.updates} updates"
        if self._at is not None:
            log.warning("%s: left after %s; it goes on where the trainer's checkpoint does", self.directory, place)
        elif self._point_at:
            log.warning("%s: left after %s; it goes on after update %d", self.directory, place, self._point_at)
        else:
            log.warning("%s: left after %s; there is no resume point", self.directory, place)


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


def _weights(tensors: Tensors) -> Tensors:
    weights = {name.removeprefix(WEIGHTS): array for name, array in tensors.items() if name.startswith(WEIGHTS)}
    if not weights:
        raise ProtocolError(f"a dump must name its weights {WEIGHTS}<name>, as rule 14 says; got {sorted(tensors)[:5]}")
    return weights


def _warn_if_late(snapshot: Snapshot) -> None:
    delay = snapshot.step - snapshot.due
    if delay:
        warnings.warn(
            f"member {snapshot.index} was due after update {snapshot.due} and is taken {delay} updates late, at a rate "
            "that has jumped up: let the run see every update before the next, by one call of run.step(), or of its "
            "callback, after each",
            CycleWarning,
            stacklevel=_level_of_the_loop(),
        )


def _level_of_the_loop() -> int:
    """Return the `stacklevel` that a warning of the caller needs to point at the loop's own line."""
    frame, level = sys._getframe(5).f_back, 6  # past what has called `record`: an adapter, whatever its name
    while frame is not None and frame.f_globals.get("__name__", "").startswith("snapcore"):
        frame, level = frame.f_back, level + 1
    return level
