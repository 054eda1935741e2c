"""A run that follows a Keras model by its optimizer's own count: what the callback and TensorFlow's loop share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapcore import Cursor, Program, ProtocolError, Schedule
from snapcore.protocol import Event, Restart, as_program
from snapcore.run import AGREE_EVERY, Calls, Group, Place, Recorder, restart_weights
from snapcore.store import MANIFEST, Tensors
from snapcore_keras.schedule import accumulation, check_begin, check_rate, counted, gradients, tell_accumulation
from snapcore_keras.state import (
    Copy,
    dump_training,
    load_training,
    load_weights,
    named_weights,
    random_state,
    reset_moments,
    set_random_state,
)

if TYPE_CHECKING:
    import keras


FreshWeights = Callable[[int], "keras.Model | Tensors"]
"""Gives fresh weights for a member number: a model, or arrays by the names of a member."""


class Following:
    """Walk a program along the updates that an optimizer counts; keep members and resume points.

    Arguments:
        directory: the run's own.
        cycles_or_program: what to walk.
        model: built.
        optimizer: its optimizer; built here if it is not.
        framework: recorded with every member.
        resume: go on with an unfinished run that is there; False moves any run aside.
        resume_every: updates between two resume points, beside those at every cycle's end.
        init: for programs with `fresh` restarts.
        group: the processes that train together.
        at: where a trainer that keeps checkpoints of its own is.
        per_call: gradients that every call gives to the optimizer, at most; None if that is not known.
        check: called with what the optimizer had counted when the run had done no update, to refuse that. Where nothing
            is there to go on with, it is called before a run is moved aside. By default it is refused if the schedule
            does not begin there; if it is accepted, the run begins where the schedule does.

    Raises:
        ProtocolError: the program needs `init`, and it is missing; or the optimizer's schedule is not where the run is.
        ScheduleError: the optimizer has another schedule.
        DataError: the model is not built, or what was saved does not fit it.
        StoreError: the directory cannot be used.
    """

    def __init__(
        self,
        directory: str | Path,
        cycles_or_program: Schedule | Program,
        model: Any,
        optimizer: Any,
        *,
        framework: str,
        resume: bool = True,
        resume_every: int | None = None,
        init: FreshWeights | None = None,
        group: Group | None = None,
        at: Place | None = None,
        per_call: int | None = None,
        check: Callable[[int], None] | None = None,
    ) -> None:
        program = as_program(cycles_or_program)
        check_init(program, init)
        self._model, self._optimizer, self._init = model, optimizer, init
        named_weights(model)
        tell_accumulation(optimizer)
        rate = check_rate(optimizer, program.schedule)
        check = check or (lambda before: check_begin(rate, before))
        if not _may_go_on(Path(directory), at, resume=resume):
            check(counted(optimizer))
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self.recorder = Recorder(
            directory,
            program,
            _Source(model, optimizer),
            framework=framework,
            resume=resume,
            resume_every=resume_every,
            group=group,
            at=at,
        )
        self.cursor = self.recorder.cursor
        try:
            self._restart(self.recorder.start())
            every = (resume_every, AGREE_EVERY if group else None)
            self.calls = _calls(self.cursor, every, optimizer, per_call)
            before = counted(optimizer) - self.cursor.step
            check(before)
            schedule = check_rate(optimizer, program.schedule)
            self.before = before if schedule is None else schedule.begin
            """What the optimizer had counted when this run had done no update."""
        except BaseException:
            self.recorder.close(exact=False)
            raise

    def called(self) -> bool:
        """Count a call; return whether `look` must be called: something may be due, or a SIGTERM has come."""
        due = self.calls.next_may_be_due()
        self.calls.add()
        return due or self.recorder.told_to_end

    def updates(self) -> int:
        """Return the updates done; this waits for the one that is being done."""
        return counted(self._optimizer) - self.before

    def look(self) -> bool:
        """Read the optimizer's count and do what is due; return whether the model was given other weights."""
        new = self.updates() - self.cursor.step
        if new < 0:
            raise ProtocolError(
                f"the optimizer counts {self.updates()} updates, but {self.cursor.step} were done before: when its "
                "state is made anew, its count must be kept"
            )
        events = self.recorder.record(new, late="take")
        self.calls.settle(new)
        return self._restart(events)

    def settle(self) -> None:
        """Move to where the loop is, if the run can go on."""
        if self.calls.waiting and not self.cursor.finished and not self.recorder.failed:
            self.look()

    def _restart(self, events: tuple[Event, ...]) -> bool:
        changed = False
        for event in events:
            if isinstance(event, Restart):
                tensors = restart_weights(event, self.recorder, self._fresh)
                if tensors is not None:
                    load_weights(self._model, tensors, f"the {event.source} member")
                if event.optimizer == "reset":
                    reset_moments(self._model, self._optimizer)
                changed = True
        return changed

    def _fresh(self, member: int) -> Tensors:
        weights = self._init(member)  # type: ignore[misc]  # refused at construction if missing
        return weights if isinstance(weights, Mapping) else Copy(named_weights(weights)).resolve()


def check_init(program: Program, init: FreshWeights | None) -> None:
    """Refuse a program that needs fresh weights where there are none.

    Raises:
        ProtocolError: `init` is missing.
    """
    if program.between.source == "fresh" and init is None:
        raise ProtocolError(
            f"{program.method} starts members from fresh weights: pass init=, a function that gives a model for a "
            "member number"
        )


class _GradientCalls(Calls):
    """Calls that each give the optimizer a known number of gradients, `accumulation` of which make an update."""

    def __init__(self, cursor: Cursor, every: tuple[int | None, ...], optimizer: Any, per_call: int) -> None:
        super().__init__(cursor, every, per_call)
        self._optimizer = optimizer
        self._accumulation = accumulation(optimizer)
        self.settle(0)

    def settle(self, updates: int) -> None:
        super().settle(updates)
        self._reach = self._reach * self._accumulation - gradients(self._optimizer) % self._accumulation


def _calls(cursor: Cursor, every: tuple[int | None, ...], optimizer: Any, per_call: int | None) -> Calls:
    return Calls(cursor, every) if per_call is None else _GradientCalls(cursor, every, optimizer, per_call)


def _may_go_on(directory: Path, at: Place | None, *, resume: bool) -> bool:
    return (at is not None and at.step > 0) or (resume and (directory / MANIFEST).exists())


class _Source:
    """What is being trained, as the recorder sees it."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer

    def capture(self) -> Copy:
        return Copy(named_weights(self._model))

    def dump(self) -> tuple[Copy, dict[str, Any]]:
        return dump_training(self._model, self._optimizer), {}

    def load(self, tensors: Tensors, values: dict[str, Any]) -> None:  # noqa: ARG002 - nothing but tensors
        load_training(self._model, self._optimizer, tensors)

    def random_state(self) -> dict[str, Any] | None:
        return random_state()

    def set_random_state(self, state: dict[str, Any] | None) -> None:
        set_random_state(state)
