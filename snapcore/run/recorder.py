"""The loop's side of a run: updates are counted, and what is due is copied and handed over.

Nothing here touches a disk or waits for one. The loop waits for the copy, which the framework makes on its own device;
`Saving` writes it in another thread, in the order that durability rests on.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

from snapcore.backend import Pending, resolved
from snapcore.errors import CycleWarning, ProtocolError, SnapcoreError, StoreError
from snapcore.protocol import (
    FINISHED,
    NOTHING,
    Cursor,
    Event,
    OptimizerState,
    Program,
    Restart,
    Snapshot,
    Stop,
    as_program,
)
from snapcore.run.batches import EpochBatches, Epochs
from snapcore.run.group import Alone, Group
from snapcore.run.random_state import random_state, set_random_state
from snapcore.run.resume import last_step, open_run, read_resumed
from snapcore.run.saving import Saving, State
from snapcore.run.sigterm import SigtermHandler
from snapcore.run.trainer import Position
from snapcore.schedule import Schedule
from snapcore.store import SnapshotStore, Tensors

Batch = TypeVar("Batch")
Result = TypeVar("Result")
Measure = Callable[[Snapshot], Mapping[str, float] | None]

AGREE_EVERY = 50
"""Updates between two moments at which several processes agree whether one of them was asked to stop."""

log = logging.getLogger("snapcore")


class Source(Protocol):
    """What is being trained, as the recorder sees it: a managed loop's state, or a loop of the user's own."""

    @property
    def fresh(self) -> Callable[[int], Pending | Tensors] | None:
        """Give new weights for a member number, named as `capture` names them; None if there is no way to."""
        ...

    def capture(self) -> Pending | Tensors:
        """Return a copy of the weights that later updates cannot change."""
        ...

    def restore(self, tensors: Tensors | None, *, optimizer: OptimizerState) -> None:
        """Continue from these weights (None: from those that are there), the optimizer's moments kept or reset."""
        ...

    def dump(self) -> tuple[Pending | Tensors, dict[str, Any]] | None:
        """Return a copy of all that training needs to resume, as tensors and plain JSON; None if it cannot be resumed.

        The weights of `capture` are in it, their names after `weights/`.
        """
        ...

    def load(self, tensors: Tensors, values: dict[str, Any]) -> None:
        """Resume from what `dump` returned."""
        ...

    def settings(self) -> Mapping[str, str | float | bool | None]:
        """Return the settings in force, for a resume to compare: `optimizer` (its class), momentum and the like."""
        ...

    def random_state(self) -> Any:
        """Return the framework's own random states as plain JSON."""
        ...

    def set_random_state(self, state: Any) -> None:
        """Set them to what `random_state` returned."""
        ...


class Recorder:
    """Walk a program along real updates; keep its members and its resume point in a run directory.

    Arguments:
        directory: the run's own; created if it is not there.
        schedule_or_program: what to walk.
        source: what is being trained.
        framework: recorded with every member.
        resume: resume an unfinished run that is there; False moves any run aside.
        resume_every: updates between two resume points, beside those at every cycle's end.
        before_point: called before every resume point, to bring what belongs to it up to date.
        group: the processes that train together; number 0 writes, and all must see its directory.
        at: where a trainer that keeps checkpoints of its own starts or resumes, from `position`. Resume points and
            signals are left to it. Members taken after that are forgotten, to be taken again.
        on_member: called with each snapshot as it is taken.
        metrics: gives what to record with a member; called with its snapshot.

    Raises:
        ProtocolError: the program needs fresh weights, and the source has none to give.
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
        at: Position | None = None,
        on_member: Callable[[Snapshot], object] | None = None,
        metrics: Measure | None = None,
    ) -> None:
        self.program = as_program(schedule_or_program)
        if resume_every is not None and resume_every < 1:
            raise ProtocolError(f"resume_every counts updates, 1 or more; got {resume_every}")
        require_fresh(self.program, source.fresh)
        self.directory = Path(directory).absolute()  # once: a loop may change the working directory
        self._name = str(directory)
        self.cursor = Cursor(self.program)
        self.epochs = Epochs(self.cursor, self._random_state, self._set_random_state, self._batch_is_asked_for)
        self._source, self._framework, self._every = source, framework, resume_every
        self._before_point, self._group, self._at = before_point, group or Alone(), at
        self._agrees = self._group.size > 1 and at is None
        self._on_member, self._metrics = on_member, metrics
        self._closed = self._rate_differs = False
        self._rehearsed = False
        self._point_at = 0
        self._point_random: Any = None  # of the newest point
        self._saving = Saving(self._open(resume), self.directory, framework)
        self._sigterm = SigtermHandler(listen=at is None)

    def start(self) -> tuple[Event, ...]:
        """Resume where the run was stopped, if it was; call it once, before the first update.

        Returns:
            What was still due at this step, and has been done: the restart that follows a member, or nothing.

        Raises:
            DataError: the resume point cannot be read or does not fit.
        """
        if self._at is not None:
            return self._start_at(self._at)
        resumed = read_resumed(self.directory)
        if resumed is None:
            self._rehearse(before_training=True)
            return ()
        tensors, state = resumed
        differing = self._differing(state.get("settings", {}))
        self.cursor.load_state_dict(state["place"])
        self._point_at = self.cursor.step
        self._source.load(tensors, state["values"])
        processes = state["processes"]
        own = processes[self._group.rank if len(processes) == self._group.size else 0]
        self.epochs.load_state_dict(own["data"])
        self._set_random_state(own["random"])
        log.warning("%s: resumed after update %d of %d", self._name, self.cursor.step, self.program.updates)
        if differing:
            now = self._source.settings()
            shown = "; ".join(f"{name} {was} saved, {is_} given, {now[name]} in force" for name, was, is_ in differing)
            log.warning("%s: settings differ from those of the saved run: %s", self._name, shown)
        self._rehearse(before_training=True)
        if not self.cursor.at_member or self.program.between == NOTHING:
            return ()
        self._restart(self.program.between)  # the point was written before it
        return (self.program.between,)

    def record(
        self,
        n: int,
        *,
        late: Literal["raise", "take"] = "raise",
        metrics: Measure | None = None,
        used_lr: float | None = None,
        setter: str = "",
    ) -> tuple[Event, ...]:
        """Count `n` updates that were done, and do what is due: take the member, carry out the restart.

        Arguments:
            n: updates since the last call, 0 or more.
            late: as in `Cursor.advance`; a late snapshot is warned of.
            metrics: gives what to record with a member, in place of the recorder's own.
            used_lr: the rate that the last of these updates was done with, if it is known: it is what a member records.
            setter: who sets the rate, if it is known.

        Returns:
            What was due, in order, and has been done; the member's file is on its way.

        Raises:
            ProtocolError: as `Cursor.advance`, or an earlier member could not be written and this run cannot continue.
            StoreError, DivergedError: an earlier member could not be written or was refused.
            SystemExit: with code 143, after a SIGTERM and its resume point.
            KeyboardInterrupt: after a Ctrl-C and its resume point.

        Warns:
            CycleWarning: once, if the rate used is not the schedule's.
        """
        self._saving.check()
        before = self.cursor.step
        if n:
            self.epochs.settle()
            if used_lr is not None:
                self.check_rate(used_lr, step=before + n - 1, setter=setter)
        if 0 <= n < self.cursor.until_next:  # nearly always: nothing is due
            events = self.cursor.advance(n)
        else:
            events = self._take(lambda: self.cursor.advance(n, late=late), metrics or self._metrics, used_lr)
        if n and not self._rehearsed:
            self._rehearsed = True
            self._rehearse(before_training=False)  # again: by now optimizers have made their state
        if self._every and not events and self.cursor.step // self._every != before // self._every:
            self._save_point()
        if self._sigterm.signal or self._agrees:
            self._leave_if_asked(before)
        for event in events:
            if isinstance(event, Restart):
                self._restart(event)
        return events

    def finish(self, reason: str, *, used_lr: float | None = None, setter: str = "") -> tuple[Event, ...]:
        """End early with an unfinished member, if an update was done since the last one.

        Arguments:
            reason: recorded with the run.
            used_lr: as for `record`.
            setter: as for `record`.
        """
        self._saving.check()
        if used_lr is not None:
            self.check_rate(used_lr, step=self.cursor.step - 1, setter=setter)
        return self._take(lambda: self.cursor.finish(reason), self._metrics, used_lr)

    def check_rate(self, used: float, *, step: int, setter: str = "") -> bool:
        """Compare a rate that was used with the schedule's, and warn once if they differ.

        Arguments:
            used: the rate of one update.
            step: updates done before that one.
            setter: who sets the rate, if it is known.

        Returns:
            Whether it is the schedule's, as far as float32 tells.
        """
        planned = self.program.schedule(step)
        if abs(used - planned) <= 1e-5 * self.program.schedule.lr:
            return True
        if not self._rate_differs:
            self._rate_differs = True
            warnings.warn(
                f"update {step + 1} was done at the rate {used:.6g}, and the schedule's is {planned:.6g}: "
                f"{setter or 'something else'} sets it; members record the rate that was used",
                CycleWarning,
                stacklevel=_level_of_the_loop(),
            )
        return False

    @property
    def store(self) -> SnapshotStore:
        """The run directory, open to write; process 0's alone."""
        return self._saving.store

    @property
    def intervals(self) -> tuple[int, ...]:
        """Lengths, in updates, at whose multiples something is due beside the ends of cycles."""
        return tuple(length for length in (self._every, AGREE_EVERY if self._agrees else None) if length)

    def position(self) -> Position:
        """Return where the run is, for a trainer's own checkpoint, once the members before it are on disk.

        Raises:
            StoreError, DivergedError, ProtocolError: a member could not be written or was refused.
        """
        self._saving.check()
        self._saving.drain()
        return Position(self.cursor.step, self._saving.digests())

    @property
    def failed(self) -> bool:
        """Whether a member could not be written: nothing is any more, and the run cannot continue."""
        return self._saving.failed

    @property
    def asked_to_stop(self) -> bool:
        """Whether a SIGTERM or a Ctrl-C has come; the next update recorded answers it."""
        return self._sigterm.received

    def batches(self, loader: Iterable[Batch], *, stateful: bool = False) -> Iterator[Batch]:
        """Yield the loader's batches until the program stops; after a resume, from where it was.

        See `Epochs.walk`.
        """
        return self.epochs.walk(loader, stateful=stateful)

    def epochs_of(
        self, loader: Iterable[Batch], *, stateful: bool = False
    ) -> Iterator[tuple[int, EpochBatches[Batch]]]:
        """Yield (epoch, its batches) until the program stops; after a resume, from the epoch it was in.

        See `Epochs.epochs`.
        """
        return self.epochs.epochs(loader, stateful=stateful)

    def save_point(self) -> None:
        """Write a resume point of this step now, unless there is one or nothing is left to resume."""
        if not self.cursor.finished and self.cursor.step > self._point_at:
            self._save_point()

    def close(self, *, exact: bool = True) -> None:
        """Wait for the writer, release the directory, and raise the writer's error if it has one.

        Arguments:
            exact: whether the source is as the last update left it, so that a run left early may resume from here.

        Raises:
            StoreError, DivergedError: a member or the resume point could not be written or was refused.
            SystemExit, KeyboardInterrupt: after a SIGTERM or a Ctrl-C that no update has answered.
        """
        if self._closed:
            return
        self._closed = True
        early = not self.cursor.finished and not self.failed
        try:
            try:
                if early and exact and self.cursor.step > self._point_at:
                    self._save_point(self.epochs.random_when_asked)
            finally:
                self._saving.close()
            if early:
                self._say_where_it_was_left()
        finally:
            self._sigterm.remove()
        if exact and self._sigterm.received:
            self._sigterm.leave()

    place = position  # scripts that wait for the files call it so

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error may have come in the middle of an update, with half of the weights moved.
        self.close(exact=kind is None)

    def _open(self, resume: bool) -> SnapshotStore | None:
        """Open the directory in process 0."""
        return self._in_first(
            lambda: open_run(self.directory, self.program, self._framework, resume=resume, at=self._at)
        )

    def _in_first(self, action: Callable[[], Result]) -> Result | None:
        """Do something in process 0; what is refused there is refused in every process, so that none waits for ever."""
        result: Result | None = None
        refusal: SnapcoreError | None = None
        if self._group.rank == 0:
            try:
                result = action()
            except SnapcoreError as error:
                refusal = error
        message = self._group.gather(None if refusal is None else str(refusal))[0]
        if refusal is not None:
            raise refusal
        if message is not None:
            raise StoreError(message)
        return result

    def _rehearse(self, *, before_training: bool) -> None:
        """Copy once what is going to be saved, and refuse what cannot be: at the start, not at the end of a cycle."""
        dumped = self._source.dump() if self._at is None else None
        copy, values = (self._source.capture(), {}) if dumped is None else dumped
        self._in_first(lambda: self._saving.rehearse(copy, values, dumped=dumped is not None, first=before_training))

    def _differing(self, saved: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Return each setting that is not the saved run's, as it was and as it is given; refuse another optimizer."""
        given = self._source.settings()
        if "optimizer" in saved and given.get("optimizer", saved["optimizer"]) != saved["optimizer"]:
            raise StoreError(
                f"{self.directory} holds a run trained by {saved['optimizer']}, got {given['optimizer']}: give that "
                "optimizer, or choose another directory"
            )
        return [(name, was, given[name]) for name, was in saved.items() if name in given and given[name] != was]

    def _batch_is_asked_for(self) -> None:
        """Keep the random states of this moment with a point that no update has followed.

        What a loop does between an update and the next batch, such as an evaluation, may draw random numbers, and a
        resumed run does not do it again.
        """
        if self._point_random is None or self._closed or self.epochs.settled:
            return
        random = self._random_state()
        if any(self._group.gather(random != self._point_random)):
            self._point_random = random
            self._saving.amend(self.cursor.step, self._processes(random))

    def _start_at(self, at: Position) -> tuple[Event, ...]:
        last = last_step(self.directory, len(at.members))
        stopped = FINISHED if last == self.program.updates else None
        self.cursor.load_state_dict({"step": last, "taken": len(at.members), "last": last, "stopped": stopped})
        if at.step:
            log.warning("%s: resumed after update %d of %d", self._name, at.step, self.program.updates)
        self._rehearse(before_training=True)
        # What is due at this very step was not taken before the checkpoint, which has the weights for it.
        return self.record(at.step - last, late="take")

    def _take(
        self, move: Callable[[], tuple[Event, ...]], metrics: Measure | None, used_lr: float | None
    ) -> tuple[Event, ...]:
        """Move the cursor to what is due, copy what is to be kept, and hand it over."""
        before = self.cursor.state_dict()
        events = move()
        snapshot = next((event for event in events if isinstance(event, Snapshot)), None)
        stop = next((event for event in events if isinstance(event, Stop)), None)
        try:
            if snapshot is not None:
                _warn_if_late(snapshot)
                values = metrics(snapshot) if metrics else None
                self._saving.reserve()  # before the copy: a slow disk must not have copies pile up
                copy, state = self._copy(resumable=stop is None)
                if used_lr is not None and not self.check_rate(used_lr, step=snapshot.step - 1):
                    snapshot = replace(snapshot, lr=used_lr)
                self._saving.member(snapshot, values, copy, state, stop)
            elif stop is not None:
                self._saving.stopped(stop)
        except BaseException:
            self.cursor.load_state_dict(before)  # nothing was taken: it is still due
            raise
        if snapshot is not None and self._on_member is not None:
            self._on_member(snapshot)
        if stop is not None and not self._sigterm.received:
            self._sigterm.remove()  # nothing is left to save, so the signal is the program's own again
        return events

    def _copy(self, *, resumable: bool, random: Any = None) -> tuple[Pending | Tensors, State | None]:
        """Copy the weights, with all else that a resume point needs if there is to be one."""
        if not resumable or self._at is not None:
            return self._source.capture(), None
        if self._before_point is not None:
            self._before_point()
        random = random or self._random_state()
        processes = self._processes(random)
        dumped = self._source.dump()
        if dumped is None:
            return self._source.capture(), None
        tensors, values = dumped
        self._point_at, self._point_random, self.epochs.settled = self.cursor.step, random, False
        return tensors, {
            "framework": self._framework,
            "place": self.cursor.state_dict(),
            "values": values,
            "processes": processes,
            "settings": self._source.settings(),
        }

    def _processes(self, random: Any) -> list[Any]:
        return self._group.gather({"random": random, "data": self.epochs.state_dict()})

    def _save_point(self, random: Any = None) -> None:
        if self._at is not None:
            return
        self._saving.reserve()
        copy, state = self._copy(resumable=True, random=random)
        if state is not None:
            self._saving.point(copy, state)

    def _restart(self, restart: Restart) -> None:
        tensors: Tensors | Pending | None = None
        if restart.source == "first":
            self._saving.drain()
            self._group.gather(None)  # no process reads the file before process 0 has written it
            tensors = self._saving.first_member()
        elif restart.source == "fresh" and self._source.fresh is not None:
            tensors = self._source.fresh(self.cursor.taken + 1)
        self._source.restore(None if tensors is None else resolved(tensors), optimizer=restart.optimizer)

    def _random_state(self) -> dict[str, Any]:
        return {**random_state(), "framework": self._source.random_state()}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        set_random_state(state)
        self._source.set_random_state(state["framework"])

    def _leave_if_asked(self, before: int) -> None:
        """Answer a signal with a resume point and leave; several processes leave at the same update."""
        if self.cursor.step == before:
            return
        received = self._sigterm.signal or 0
        if self._group.size > 1:
            if self.cursor.step // AGREE_EVERY == before // AGREE_EVERY and not self.cursor.finished:
                return
            received = max(self._group.gather(received))
            if received:
                self._sigterm.note(received)
        if not received:
            return
        if self._sigterm.answer():
            self.close()  # which leaves, since a signal was received
        elif not self.cursor.finished and self.cursor.step > self._point_at:
            self._save_point()  # other runs of this process have yet to answer

    def _say_where_it_was_left(self) -> None:
        done = f"{self.cursor.step} of {self.program.updates} updates"
        if self._at is not None:
            log.warning("%s: left after %s; it resumes where the trainer's checkpoint does", self._name, done)
        elif self._point_at:
            log.warning("%s: left after %s; it resumes after update %d", self._name, done, self._point_at)
        else:
            log.warning("%s: left after %s; there is no resume point", self._name, done)


def require_fresh(program: Program, fresh: object | None) -> None:
    """Refuse a program that needs fresh weights where nothing gives them.

    Raises:
        ProtocolError: `fresh` is None, and the program restarts from fresh weights.
    """
    if program.between.source == "fresh" and fresh is None:
        raise ProtocolError(
            f"{program.method} starts members from fresh weights: pass init=, a function from a member's number to "
            "new weights"
        )


def _warn_if_late(snapshot: Snapshot) -> None:
    delay = snapshot.step - snapshot.due
    if delay:
        warnings.warn(
            f"member {snapshot.index} was due after update {snapshot.due} and is taken {delay} updates late, at a rate "
            "that has jumped up: call run.step(), or the callback, after every update",
            CycleWarning,
            stacklevel=_level_of_the_loop(),
        )


def _level_of_the_loop() -> int:
    """Return the `stacklevel` with which a warning of the caller points at the loop's own line."""
    entries = (Recorder.record.__code__, Recorder.finish.__code__)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code not in entries:
        frame, level = frame.f_back, level + 1
    # What has called the recorder is an adapter, whatever its name; what calls that may be snapcore's own too.
    frame, level = frame.f_back or frame, level + 1
    frame, level = frame.f_back or frame, level + 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("snapcore"):
        frame, level = frame.f_back, level + 1
    return level
