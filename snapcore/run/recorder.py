"""The loop's side of a run: updates are counted, and what is due is copied and handed over.

Nothing here touches a disk or waits for one. The loop waits for the copy, which the framework makes on its own device;
`Saving` writes it in another thread, in the order that durability rests on.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from snapcore.backend import Pending, resolved
from snapcore.errors import ProtocolError
from snapcore.protocol import FINISHED, NOTHING, Cursor, Event, Program, Restart, Snapshot, Stop, as_program
from snapcore.run.batches import EpochBatches
from snapcore.run.group import Alone, Group, in_first
from snapcore.run.kept_workers import warn_of_kept_workers
from snapcore.run.loop_warning import warn_at_loop
from snapcore.run.points import ResumePoints
from snapcore.run.resume import last_step, open_run
from snapcore.run.saving import Saving
from snapcore.run.sigterm import SigtermHandler
from snapcore.run.source import Source, require_fresh
from snapcore.run.trainer import Position
from snapcore.schedule import Schedule
from snapcore.store import SnapshotStore, Tensors

Batch = TypeVar("Batch")
Measure = Callable[[Snapshot], Mapping[str, float] | None]

AGREE_EVERY = 50
"""Updates between two moments at which several processes agree whether one of them was asked to stop."""

log = logging.getLogger("snapcore")


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
        self._source, self._every, self._at, self._group = source, resume_every, at, group or Alone()
        self._agrees = self._group.size > 1 and at is None
        self._on_member, self._metrics = on_member, metrics
        self._closed = self._rate_differs = self._rehearsed = False
        store = in_first(self._group, lambda: open_run(self.directory, self.program, framework, resume=resume, at=at))
        self._saving = Saving(store, self.directory, framework)
        self._points = ResumePoints(
            source,
            self.cursor,
            self._saving,
            self._group,
            directory=self.directory,
            framework=framework,
            before=before_point,
            kept=at is None,
        )
        self.epochs = self._points.epochs
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
        resumed = self._points.load(self._name)
        self._rehearse(before_training=True)
        if not resumed or not self.cursor.at_member or self.program.between == NOTHING:
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
            self._points.save()
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
            warn_at_loop(
                f"update {step + 1} was done at the rate {used:.6g}, and the schedule's is {planned:.6g}: "
                f"{setter or 'something else'} sets it; members record the rate that was used"
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
        warn_of_kept_workers(loader)
        return self.epochs.walk(loader, stateful=stateful)

    def epochs_of(
        self, loader: Iterable[Batch], *, stateful: bool = False
    ) -> Iterator[tuple[int, EpochBatches[Batch]]]:
        """Yield (epoch, its batches) until the program stops; after a resume, from the epoch it was in.

        See `Epochs.epochs`.
        """
        warn_of_kept_workers(loader)
        return self.epochs.epochs(loader, stateful=stateful)

    def save_point(self) -> None:
        """Write a resume point of this step now, unless there is one or nothing is left to resume."""
        self._points.save()

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
        self._points.close()
        early = not self.cursor.finished and not self.failed
        try:
            try:
                if early and exact:
                    self._points.save(self.epochs.random_when_asked)
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

    def _rehearse(self, *, before_training: bool) -> None:
        """Copy once what is going to be saved, and refuse what cannot be: at the start, not at the end of a cycle."""
        dumped = self._source.dump() if self._at is None else None
        copy, values = (self._source.capture(), {}) if dumped is None else dumped
        in_first(
            self._group, lambda: self._saving.rehearse(copy, values, dumped=dumped is not None, first=before_training)
        )

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
                if snapshot.step > snapshot.due:
                    warn_at_loop(
                        f"member {snapshot.index} was due after update {snapshot.due} and is taken "
                        f"{snapshot.step - snapshot.due} updates late, at a rate that has jumped up: call run.step(), "
                        "or the callback, after every update"
                    )
                values = metrics(snapshot) if metrics else None
                self._saving.reserve()  # before the copy: a slow disk must not have copies pile up
                copy, state = self._points.copy() if stop is None else (self._source.capture(), None)
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

    def _restart(self, restart: Restart) -> None:
        tensors: Tensors | Pending | None = None
        if restart.source == "first":
            self._saving.drain()
            self._group.gather(None)  # no process reads the file before process 0 has written it
            tensors = self._saving.first_member()
        elif restart.source == "fresh" and self._source.fresh is not None:
            tensors = self._source.fresh(self.cursor.taken + 1)
        self._source.restore(None if tensors is None else resolved(tensors), optimizer=restart.optimizer)

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
        else:
            self._points.save()  # other runs of this process have yet to answer

    def _say_where_it_was_left(self) -> None:
        done = f"{self.cursor.step} of {self.program.updates} updates"
        if self._at is not None:
            log.warning("%s: left after %s; it resumes where the trainer's checkpoint does", self._name, done)
        elif self._points.newest:
            log.warning("%s: left after %s; it resumes after update %d", self._name, done, self._points.newest)
        else:
            log.warning("%s: left after %s; there is no resume point", self._name, done)
