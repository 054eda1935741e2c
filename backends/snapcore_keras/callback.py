"""Snapshots from `model.fit`: one callback, on whichever backend Keras runs.

Keras calls a callback for batches, and its own numbers for them are no counts: what counts is the optimizer. On JAX the
model's variables are empty between batches, and looking at `self.model` fills them at the price of a round trip; so it
is looked at only when calls can have led to a boundary. On JAX and PyTorch, Keras reports the ends of batches in other
threads unless a callback wants them in its own, and then no batch waits for the loss of the one before. So this
callback takes them there as well, and does its work when Keras asks after a batch, in its own thread, whether to stop.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras

from snapcore import Program, ProtocolError, Schedule, Snapshot
from snapcore.protocol import Restart, as_program
from snapcore.run import Position, require_fresh
from snapcore.store import MANIFEST, SnapshotStore, read_point
from snapcore_keras.run import FreshWeights, KerasRun, check_kinds
from snapcore_keras.schedule import (
    accumulation,
    check_begin,
    check_rate,
    counted,
    give_schedule,
    given_schedule,
    gradients,
    has_plain_rate,
    innermost,
    set_accumulation,
)
from snapcore_keras.state import fingerprint, is_built
from snapcore_keras.steps_per_execution import check_cycles, check_epochs

_FRAMEWORK = "keras"


class SnapshotCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Take snapshots while `model.fit` trains, and resume after a kill.

    An update is what the optimizer counts, `optimizer.iterations`. `steps_per_execution`, gradient accumulation, what
    a scaled loss skips, `initial_epoch`, several calls of `fit`, and validation in between change nothing about when
    a snapshot is taken: after the last update of a cycle, the last one when training ends on it. Then training stops,
    whatever `epochs` says. An optimizer built with the matching `SnapshotSchedule` is left alone, but for the number of
    gradients in an update, which its schedule gets from here. One with a plain rate is given the schedule, from where
    it is; the next run, in another directory, gives it its own.

    After a kill, call `fit` with a new callback for the same directory. Weights, optimizers, rate and the states of
    random and stateful recurrent layers resume exactly at the newest resume point, while Keras begins another epoch of
    data. (On PyTorch, a random layer without a seed draws from PyTorch's own generators. Their states are restored too,
    but the loaders that Keras makes draw from them as well, at every epoch: such a layer is exact if `fit` is given a
    `DataLoader` with a `generator` of its own.) Beside `keras.callbacks.BackupAndRestore`, the run resumes where that
    has put the model: members taken later are forgotten and taken again. Put this callback before it in the list:
    members are then on disk before a backup counts on them. A model that was loaded with its optimizer resumes alike.

    What Keras puts into the model when `fit` ends, the averages of `use_ema` or the best weights of `EarlyStopping`, is
    no part of the run: it resumes from the weights of the last update.

    A model that Keras builds in its first batch is followed from there. To resume a run, build it before.

    Arguments:
        directory: the run's own; created.
        cycles_or_program: a schedule, or a program from `snapcore.program`.
        resume: resume an unfinished run that is there; False moves any run aside, unless the model is in it.
        resume_every: updates between two resume points, beside those at every cycle's end.
        init: for programs with `fresh` restarts: gives a model, or arrays by name, for a member number.
        optimizer: the one whose updates count, where it is not `model.optimizer`, as in a model with a `compile` and a
            `train_step` of its own.
        on_member: called with each snapshot as it is taken.
        metrics: gives what to record with a member; called with its snapshot.

    Raises:
        ScheduleError: when training starts: the optimizer has another schedule, or `steps_per_execution` does not
            divide a cycle.
        ProtocolError: `cycles_or_program` is neither; the program restarts from fresh weights and `init` is missing; an
            epoch's batches would make snapshots late; the optimizer has counted updates that the run has not seen, or
            trains another model, or does not train this one; or another callback sets the rate.
        StoreError: the directory holds a finished run or another program's, is being written, or cannot be written.
        DataError: the model is not built where a run is to resume, or what was saved does not fit it.

    Example:
        >>> import tempfile, keras, numpy as np
        >>> from snapcore import CosineCycles
        >>> from snapcore.store import SnapshotStore
        >>> from snapcore_keras import SnapshotSchedule
        >>> cycles = CosineCycles(lr=0.1, steps=64, cycles=4)
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model.compile(keras.optimizers.SGD(SnapshotSchedule(cycles), momentum=0.9), loss="mse")
        >>> x, y = np.ones((128, 4)), np.zeros((128, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     callback = SnapshotCallback(folder, cycles)
        ...     history = model.fit(x, y, batch_size=8, epochs=4, callbacks=[callback], verbose=0)
        ...     [member.step for member in SnapshotStore(folder).members]
        [16, 32, 48, 64]
    """

    def __init__(
        self,
        directory: str | Path,
        cycles_or_program: Schedule | Program,
        *,
        resume: bool = True,
        resume_every: int | None = None,
        init: FreshWeights | None = None,
        optimizer: Any = None,
        on_member: Callable[[Snapshot], object] | None = None,
        metrics: Callable[[Snapshot], Mapping[str, float] | None] | None = None,
    ) -> None:
        super().__init__()
        self.directory = Path(directory).absolute()
        self.program = as_program(cycles_or_program)
        require_fresh(self.program, init)
        self._resume = resume
        self._options: dict[str, Any] = {"resume_every": resume_every, "init": init}
        self._options |= {"on_member": on_member, "metrics": metrics}
        self._optimizer = optimizer
        self._left: tuple[bytes, ...] | None = None  # a fingerprint of the weights after the last epoch
        self._run: KerasRun | None = None
        self._thread = threading.get_ident()
        self._counted = 0
        self._waits = self._begun = self._begins = self._notified = False

    @property
    def async_safe(self) -> bool:
        """Whether Keras may report the end of a batch in another thread: not to a subclass with a hook of its own."""
        return type(self).on_train_batch_end is SnapshotCallback.on_train_batch_end

    def set_model(self, model: Any) -> None:
        """Check the optimizer and give it the schedule if it has none, before any callback restores anything."""
        super().set_model(model)
        self._thread = threading.get_ident()
        left = _OPEN.get(self.directory)
        if left is not None and left._thread == self._thread:
            left.close()  # its `fit` has died: in the thread that begins one, no other can be under way
        self._waits = self._begun = self._begins = self._notified = False
        model = self.model
        optimizer = self._trains(model)
        check_kinds(model, optimizer)
        _refuse_other_rates()
        check_cycles(self.program.schedule, model.steps_per_execution, accumulation(optimizer))
        self._counted = counted(optimizer)
        if self._gives(optimizer):
            self._give(model, self._counted)
        elif set_accumulation(optimizer):
            _forget_traces(model)
        check_rate(optimizer, self.program.schedule)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Open the run before the first batch, where the model is by now; after it, if Keras builds the model in it."""
        if self._run is None:
            model = self.model
            restored = counted(self._trains(model)) != self._counted
            saved = restored or (self._resume and read_point(self.directory) is not None)
            self._waits = not saved and not is_built(model)  # for Keras to build it: there is nothing to put into it
            if self._waits:
                self._check(model, self._counted)
            else:
                self._open(model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Have Keras ask whether to stop, after a batch that may lead to a boundary."""
        if self._begun:
            self._take()  # nobody has asked, since nothing could be due
        self._begun = self._begins = True
        run, model = self._run, self._model  # `self.model` would have JAX bring its state together
        if not self._notified and run is not None and run.may_be_due() and not model.stop_training:
            model.stop_training = _StopFlag(self)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Take what is due; end training with the program."""
        if threading.get_ident() == self._thread:
            self._notified = True
            if self._begun or not self._begins:
                self._take()
        elif not self._begins:
            raise ProtocolError(
                "a batch ended in another thread, and on_train_batch_begin was not called before: call it, too"
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Wait for the files that a backup of this epoch counts on; after the last epoch, write a resume point.

        When training ends, Keras replaces the weights by their averages (`use_ema`), and `EarlyStopping` by the best
        ones, before `on_train_end` is called. So the point to resume from is written here.
        """
        if self._begun:
            self._take()
        run, model = self._run, self._model  # whose variables Keras has given their values by now, on JAX too
        if run is None:
            return
        if run.waiting:  # else it was done at the boundary, for the member
            run.recorder.position()
        if (epoch + 1 == self.params.get("epochs") or model.stop_training) and not run.cursor.finished:
            if run.waiting:
                run.look()
            run.recorder.save_point()
            self._left = fingerprint(model.weights)

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Wait for the files, and raise what writing them raised; a later `fit` resumes."""
        if self._run is None and counted(self._trains(self._model)) != self._counted:
            self._open(self.model)  # a backup was made after the last epoch, and what was due there may not be on disk
        self.close()

    def close(self) -> None:
        """Release the directory after a `fit` that has died; a later one resumes where this left the model.

        Raises:
            StoreError, DivergedError: a member or the resume point could not be written or was refused.
            SystemExit, KeyboardInterrupt: after a SIGTERM or a Ctrl-C that no update has answered.
        """
        run, self._run = self._run, None
        left, self._left = self._left, None
        if run is None:
            return
        _OPEN.pop(self.directory, None)
        self._ask_no_more()
        # Weights that were replaced since the last update are none to resume from: the newest point is.
        if left is None:  # a `fit` that has died or was stopped: Keras puts averages in even so
            exact = not getattr(innermost(self._model.optimizer), "use_ema", False)
        else:
            exact = fingerprint(self._model.weights) == left
        if run.waiting or not exact:
            run.close(exact=exact)
        else:  # what was counted has been seen; on JAX the count of a `fit` that has died may be older
            run.recorder.close()

    def _take(self) -> None:
        """Do what is due after the batch that has begun."""
        self._begun = False
        self._ask_no_more()
        if self._waits:
            self._open_late(self.model)
        run = self._run
        if run is None:
            raise ProtocolError("no run is open: Keras calls on_epoch_begin before any batch; call it in a loop, too")
        if not run.call():
            run.recorder.record(0)  # raises what the writer has met
            return
        model = self.model  # on JAX this gives the variables their values
        if not run.cursor.finished and any(isinstance(event, Restart) for event in run.look()):
            run.recorder.position()  # a backup made now has the new weights: the member must be on disk
        model.stop_training |= run.cursor.finished

    def _is_over(self) -> bool:
        """Do what is due, if Keras asks for the first time since the batch began; return whether training ends."""
        if self._begun and threading.get_ident() == self._thread:
            self._take()
        return self._run is not None and self._run.cursor.finished

    def _ask_no_more(self) -> None:
        if isinstance(self._model.stop_training, _StopFlag):
            self._model.stop_training = False

    def _trains(self, model: Any) -> Any:
        """Return the optimizer whose updates count."""
        return model.optimizer if self._optimizer is None else self._optimizer

    def _gives(self, optimizer: Any) -> bool:
        """Return whether this run gives the schedule: the rate is plain, or was until a run that is not this one."""
        rate = given_schedule(optimizer)
        if rate is None:
            return has_plain_rate(optimizer)
        inside = 0 < self._counted - rate.begin < self.program.updates
        if rate.cycles != self.program.schedule or not inside or not (self.directory / MANIFEST).exists():
            return True
        store = SnapshotStore(self.directory)
        return store.stopped is not None or store.program != self.program.to_dict()

    def _give(self, model: Any, begin: int) -> None:
        give_schedule(self._trains(model), self.program.schedule, begin)
        _forget_traces(model)

    def _open(self, model: Any) -> None:
        now = counted(self._trains(model))
        begin = check_rate(self._trains(model), self.program.schedule).begin  # type: ignore[union-attr]  # set by now
        at, resume = self._where(now - begin, restored=now != self._counted)
        self._follow(model, at=at, resume=resume, check_begin_at=lambda before: self._check(model, before))

    def _open_late(self, model: Any) -> None:
        """Open the run of a model that was built in its first execution."""
        done, first = counted(self._trains(model)) - self._counted, self.program.schedule.snapshot_steps[0]
        if done > first:
            raise ProtocolError(
                f"{model.name} was built in its first execution, whose {done} updates lead past the snapshot due after "
                f"{first}: build it first, by calling it on a batch"
            )
        self._follow(model, resume=self._resume, check_begin_at=lambda before: None)  # noqa: ARG005
        self._waits = False

    def _follow(self, model: Any, **where: Any) -> None:
        known = type(model).train_step is keras.Model.train_step
        self._run = KerasRun(
            self.directory,
            self.program,
            model,
            self._trains(model),
            framework=_FRAMEWORK,
            per_call=model.steps_per_execution if known else None,
            **where,
            **self._options,
        )
        self._resume = True
        _OPEN[self.directory] = self
        model.stop_training |= self._run.cursor.finished

    def _where(self, step: int, *, restored: bool) -> tuple[Position | None, bool]:
        """Return the position that the model is at, or None to resume from a point of our own; and whether to resume.

        Arguments:
            step: updates that the model has behind it.
            restored: whether another callback has restored it since training began.
        """
        if step <= 0 or not (self.directory / MANIFEST).exists():
            return None, self._resume
        store = SnapshotStore(self.directory)
        if store.program != self.program.to_dict() or (store.stopped is not None and not restored):
            return None, self._resume
        point = read_point(self.directory)
        if point is not None and (point.state["place"]["step"] == step or point.state["framework"] != _FRAMEWORK):
            return None, True
        with SnapshotStore(self.directory, "w") as store:
            indexes = [member.index for member in store.members]
            if point is not None and point.member is not None and point.member.index not in indexes:
                store.add(point.member)  # killed between the two
            store.clear_point()
            members = tuple(member.sha256 for member in store.members if member.step <= step)
        return Position(min(step, self.program.updates), members), True

    def _check(self, model: Any, before: int) -> None:
        """Refuse a run that cannot begin here, or resume here.

        Arguments:
            model: what is trained.
            before: what its optimizer had counted when the run had done no update.
        """
        optimizer = self._trains(model)
        given = given_schedule(optimizer)
        if given is None:
            check_begin(check_rate(optimizer, self.program.schedule), before)
        elif given.begin != before:
            self._give(model, before)
        parts = accumulation(optimizer)
        done = gradients(optimizer) - before * parts
        due = (step * parts - done for step in self.program.schedule.snapshot_steps)
        check_epochs(tuple(each for each in due if each > 0), model.steps_per_execution, self.params["steps"])


class _StopFlag:
    """Stands for `stop_training` in a batch that may lead to a boundary: Keras asks it after each, in its thread."""

    def __init__(self, callback: SnapshotCallback) -> None:
        self._callback = callback

    def __bool__(self) -> bool:
        return self._callback._is_over()


def _refuse_other_rates() -> None:
    """Refuse other callbacks that set the rate, which Keras would do with a raw error after an epoch, or after many."""
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), keras.callbacks.CallbackList):
        frame = frame.f_back  # type: ignore[assignment]  # who calls `set_model` is the list of all callbacks
    others = [] if frame is None else frame.f_locals["self"].callbacks
    for each in others:
        if isinstance(each, keras.callbacks.LearningRateScheduler | keras.callbacks.ReduceLROnPlateau):
            raise ProtocolError(
                f"SnapshotCallback and {type(each).__name__} would both set the learning rate: leave the latter out"
            )


_OPEN: dict[Path, SnapshotCallback] = {}
"""Callbacks whose run is open, by its directory: Keras calls nobody when a `fit` dies."""


def _forget_traces(model: Any) -> None:
    """Have Keras trace the update again, which an earlier `fit` has traced with the rate that was."""
    if model.train_function is not None:
        model.make_train_function(force=True)
