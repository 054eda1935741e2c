"""A method is data, and a cursor walks it.

A `Program` is two values: a schedule (the rate of every update, and when snapshots are due) and what
happens between members. Read as a sequence it lists four kinds of instruction; a `Cursor` walks it, one
update or many at a time, and says what is due. Nothing here touches a tensor. There is one time axis:
`step` counts optimizer updates, from 0, and only goes up.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, overload

from snapcore.errors import ProtocolError, ScheduleError
from snapcore.schedule import CosineCycles, Schedule, StepDecay, schedule_from_dict

Source = Literal["previous", "first", "fresh"]
OptimizerState = Literal["keep", "reset"]


@dataclass(frozen=True, slots=True)
class Train:
    """Do updates `start … stop − 1` natively, each at the rate `schedule(step)`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copy the weights now: after the last update of a cycle, before the rate jumps.

    `index` counts members from 1; `step` is the updates done and `due` the updates at which it was due,
    equal unless the snapshot is late; `lr` is the rate of the last update, `schedule(step - 1)`; `cycle`
    is 0-based; `unfinished` marks a member taken because training ended before its cycle did.
    """

    index: int
    step: int
    due: int
    lr: float
    cycle: int
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Restart:
    """Continue from the `previous` weights, from those of the `first` snapshot, or from `fresh` ones.

    `optimizer` says whether its moments are kept or reset; its count of updates is never reset.
    """

    source: Source
    optimizer: OptimizerState

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("source", self.source, get_args(Source)),
            ("optimizer", self.optimizer, get_args(OptimizerState)),
        ):
            if value not in choices:
                raise ProtocolError(f"{name} must be one of {choices}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Stop:
    """Finished, and why."""

    reason: str


Instruction = Train | Snapshot | Restart | Stop
Event = Snapshot | Restart | Stop

NOTHING = Restart("previous", "keep")
"""Between members nothing happens: an instruction that does nothing, and so is never emitted."""

FINISHED = "finished"


@dataclass(frozen=True)
class Program(Sequence[Instruction]):
    """A method as a sequence of instructions that ends in `Stop`.

    Arguments:
        method: its name, for people and manifests.
        schedule: the rate of every update, and when snapshots are due.
        between: what happens after each member but the last.

    Example:
        >>> from snapcore import CosineCycles
        >>> for instruction in Program("mine", CosineCycles(0.2, 32, 2), Restart("first", "reset")):
        ...     print(instruction)  # doctest: +ELLIPSIS
        Train(start=0, stop=16)
        Snapshot(index=1, step=16, due=16, lr=0.0019214..., cycle=0, unfinished=False)
        Restart(source='first', optimizer='reset')
        Train(start=16, stop=32)
        Snapshot(index=2, step=32, due=32, lr=0.0019214..., cycle=1, unfinished=False)
        Stop(reason='finished')
    """

    method: str
    schedule: Schedule
    between: Restart = NOTHING

    @property
    def updates(self) -> int:
        """The true cost: optimizer updates done in all."""
        return self.schedule.steps

    def to_dict(self) -> dict[str, Any]:
        """Return the program as plain JSON, for `program_from_dict`."""
        return {"method": self.method, "schedule": self.schedule.to_dict(), "between": asdict(self.between)}

    def __iter__(self) -> Iterator[Instruction]:
        cursor = Cursor(self)
        while not cursor.finished:
            yield Train(cursor.step, cursor.step + cursor.until_next)
            yield from cursor.advance(cursor.until_next)

    def __len__(self) -> int:
        members = len(self.schedule.snapshot_steps)
        return 2 * members + (members - 1) * (self.between != NOTHING) + 1

    @overload
    def __getitem__(self, index: int) -> Instruction: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Instruction]: ...
    def __getitem__(self, index: int | slice) -> Instruction | Sequence[Instruction]:
        return tuple(self)[index]


def _full_length_cycles(lr: float, steps: int, cycles: int, **options: Any) -> CosineCycles:
    try:
        total = operator.index(steps) * operator.index(cycles)
    except TypeError:
        raise ScheduleError(f"steps and cycles must be integers, got {steps!r} and {cycles!r}") from None
    return CosineCycles(lr, total, cycles, **options)


_METHODS: dict[str, tuple[Callable[..., Schedule], Restart]] = {
    "single": (lambda lr, steps, _, **options: StepDecay(lr, steps, **options), NOTHING),
    "cosine": (lambda lr, steps, _, **options: CosineCycles(lr, steps, 1, **options), NOTHING),
    "nocycle": (lambda lr, steps, _, **options: StepDecay(lr, steps, **{"snapshots": 6, **options}), NOTHING),
    "snapshot": (CosineCycles, NOTHING),
    "singlecycle": (CosineCycles, Restart("fresh", "reset")),
    "independent": (_full_length_cycles, Restart("fresh", "reset")),
    "star": (CosineCycles, Restart("first", "reset")),
}
"""Each method's schedule, made of the rate, the budget and the number of cycles, and what happens between members."""

METHODS = tuple(_METHODS)


def program(method: str, *, lr: float, steps: int, cycles: int, **schedule_options: Any) -> Program:
    """List a method as a program.

    | method | schedule | between members |
    |---|---|---|
    | `single` | lr, ÷10 at 50 %, ÷10 at 75 % | one member |
    | `cosine` | one cosine cycle | one member |
    | `nocycle` | as `single` | nothing; six members at equal spacing |
    | `snapshot` | `cycles` cosine cycles over `steps` | nothing |
    | `singlecycle` | `cycles` cosine cycles over `steps` | fresh weights, optimizer reset |
    | `independent` | `cycles` cosine cycles over `cycles · steps` | fresh weights, optimizer reset |
    | `star` | `cycles` cosine cycles over `steps` | the first member's weights, optimizer reset |

    Arguments:
        method: one of the names above.
        lr: the first rate, and the rate of every restart.
        steps: the budget T in optimizer updates; `independent` spends it once per member.
        cycles: M; the methods on the step schedule do not use it.
        **schedule_options: go to `CosineCycles` (`lr_min`, `warmup_steps`, `remainder`) or to `StepDecay`
            (`milestones`, `factor`, `snapshots`).

    Returns:
        The instructions in order, with `.method`, `.schedule` and `.updates`, the true cost.

    Raises:
        ProtocolError: no such method.
        ScheduleError: values that describe no schedule.

    Example:
        >>> [program(m, lr=0.1, steps=600, cycles=6).updates for m in ("snapshot", "independent")]
        [600, 3600]

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, sections 3 and 4; `star`:
    Sadrtdinov et al., To Stay or Not to Stay in the Pre-train Basin, NeurIPS 2023.
    """
    if method not in _METHODS:
        raise ProtocolError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    schedule, between = _METHODS[method]
    return Program(method, schedule(lr, steps, cycles, **schedule_options), between)


def program_from_dict(values: Mapping[str, Any]) -> Program:
    """Return the program that `to_dict` described; no warning is repeated.

    Raises:
        ProtocolError, ScheduleError: a name is missing or unknown, or a value is out of range.
    """
    objects = {name for name, value in values.items() if isinstance(value, Mapping)}
    if values.keys() != {"method", "schedule", "between"} or not {"schedule", "between"} <= objects:
        kinds = {name: type(value).__name__ for name, value in values.items()}
        raise ProtocolError(f"a program has a method and the objects schedule and between, got {kinds}")
    between = dict(values["between"])
    if between.keys() != {"source", "optimizer"}:
        raise ProtocolError(f"between has the names source and optimizer, got {sorted(between)}")
    return Program(str(values["method"]), schedule_from_dict(values["schedule"]), Restart(**between))


def as_program(schedule_or_program: Schedule | Program) -> Program:
    """Return a program; a schedule alone means its snapshots, and nothing in between.

    Raises:
        ProtocolError: it is neither.
    """
    if isinstance(schedule_or_program, Program):
        return schedule_or_program
    if not isinstance(schedule_or_program, Schedule):
        raise ProtocolError(
            "a run needs a schedule, such as CosineCycles(lr=0.1, steps=600, cycles=6), or a program from "
            f"snapcore.program; got {schedule_or_program!r}"
        )
    return Program("snapshot", schedule_or_program)


class Cursor:
    """A position in a program, moved by real updates; what it returns is due now.

    `advance` is pure bookkeeping: it either moves and returns what is due, or raises and leaves the cursor
    as it was. The position is the whole state, so resuming means setting it.

    Arguments:
        schedule_or_program: a schedule alone means its snapshots, and nothing in between.

    Example:
        >>> from snapcore import CosineCycles
        >>> cursor = Cursor(CosineCycles(lr=0.2, steps=60, cycles=3))
        >>> cursor.advance(19), cursor.until_next
        ((), 1)
        >>> [type(event).__name__ for event in cursor.advance()]
        ['Snapshot']
        >>> cursor.lr
        0.2
    """

    def __init__(self, schedule_or_program: Schedule | Program) -> None:
        self.program = as_program(schedule_or_program)
        self.schedule = self.program.schedule
        self.step = 0
        """Updates done."""
        self.taken = 0
        """Members so far."""
        self.stopped: str | None = None
        """Why the program has stopped, or None."""
        self._last = 0  # the step of the last member
        self._due = self.schedule.snapshot_steps[0]

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return self.schedule(self.step)

    @property
    def until_next(self) -> int:
        """Updates until something is due; 0 once the program has stopped."""
        return 0 if self.stopped is not None else self._due - self.step

    @property
    def finished(self) -> bool:
        """Whether the program has stopped."""
        return self.stopped is not None

    @property
    def at_member(self) -> bool:
        """Whether a member was taken at this very step."""
        return self.taken > 0 and self._last == self.step

    def advance(self, n: int = 1, *, late: Literal["raise", "take"] = "raise") -> tuple[Event, ...]:
        """Advance by `n` real updates and return what is due now, in order; usually nothing.

        Arguments:
            n: updates done since the last call, 0 or more.
            late: what to do when `n` reaches past a boundary. `"raise"` refuses; `"take"` returns one
                snapshot with the true `step`, and in `due` the newest boundary passed.

        Raises:
            ProtocolError: `n` reaches past a boundary and was not allowed to, is negative or no integer,
                or the program has stopped. The cursor is unchanged.
        """
        if n.__class__ is not int or n < 0:
            n = _updates(n)
        if n and self.stopped is not None:
            raise ProtocolError(
                f"the program stopped after {self.step} updates ({self.stopped}), got {n} more: leave the loop when "
                "it is finished, or make a schedule with more steps"
            )
        step = self.step + n
        if step < self._due or n == 0:
            self.step = step
            return ()
        if step > self._due and late != "take":
            raise ProtocolError(
                f"a snapshot is due after update {self._due}, but {n} updates at once lead from {self.step} to {step}: "
                f"advance by at most until_next={self.until_next}, or pass late='take' for one late snapshot"
            )
        self.step = step
        if step >= self.schedule.steps:
            self.stopped = FINISHED
            return self._snapshot(self.schedule.steps), Stop(FINISHED)
        cycle = self.schedule.cycle_at(step)
        snapshot = self._snapshot(self.schedule.snapshot_steps[cycle - 1])
        self._due = self.schedule.snapshot_steps[cycle]
        return (snapshot,) if self.program.between == NOTHING else (snapshot, self.program.between)

    def finish(self, reason: str) -> tuple[Event, ...]:
        """End early: an unfinished snapshot if an update was done since the last one, then `Stop`.

        A cursor that has stopped stays as it is and returns nothing.
        """
        if self.finished:
            return ()
        self.stopped = reason
        if self.step == self._last:
            return (Stop(reason),)
        return replace(self._snapshot(self.step), unfinished=True), Stop(reason)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON."""
        return {"step": self.step, "taken": self.taken, "last": self._last, "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the position.

        Raises:
            ProtocolError: `state` is no position in this program; the cursor is unchanged.
        """
        values: list[Any] = [state.get(name) for name in ("step", "taken", "last", "stopped")]
        step, taken, last, stopped = values
        reached = all(type(value) is int for value in values[:3]) and isinstance(stopped, str | None)
        if reached:
            # Every boundary passed has a member, though late ones may share it; only a stopped cursor may have more.
            boundaries = self.schedule.snapshot_steps
            passed, settled = (sum(due <= until for due in boundaries) for until in (step, last))
            ended = stopped is not None
            reached = 0 <= last <= step and (taken > 0) == (last > 0) and 0 <= taken <= passed + ended
            reached = reached and (last == step if ended else passed == settled < len(boundaries))
        if not reached:
            raise ProtocolError(f"state must be a position in a program of {self.program.updates} updates, got {state}")
        self.step, self.taken, self._last, self.stopped = step, taken, last, stopped
        self._due = self.schedule.snapshot_steps[self.schedule.cycle_at(step)]

    def _snapshot(self, due: int) -> Snapshot:
        self.taken, self._last = self.taken + 1, self.step
        lr, cycle = self.schedule(self.step - 1), self.schedule.cycle_at(due - 1)
        return Snapshot(self.taken, self.step, due, lr, cycle)


def _updates(n: Any) -> int:
    try:
        count = operator.index(n)
    except TypeError:
        raise ProtocolError(f"n counts updates, a whole number; got {n!r}") from None
    if count < 0:
        raise ProtocolError(f"n counts updates, 0 or more; got {count}")
    return count
