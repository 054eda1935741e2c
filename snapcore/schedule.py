"""Step -> learning rate, and when snapshots are due: the formula is written here and nowhere else.

A schedule is a frozen value. `schedule(step)` evaluates it with Python's own arithmetic;
`schedule.bind(ops)` gives the same function over any framework's operations, traced or vectorised.
Cycles are found in integer arithmetic, so neither rounding nor a float32 step counter shifts one.

Steps count optimizer updates that are already done (0-based); the paper's t is `step + 1`.
Only the standard library is imported here.
"""

import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, Protocol, get_args

from snapcore.errors import CycleWarning, ScheduleError

Remainder = Literal["paper", "even"]

_LONGEST = 2**20  # of the cycles among which one that anneals so far is looked for
_FALL = 0.01  # what an exponential cycle falls to, before it is shifted to end at 0
_PROBES, _NOISE = 100, 1e-9  # where a shape is looked at: 0, 1/100 … 1; and what rounding may do to it
_ANNEALED = 0.01 + _NOISE  # the most that is left of lr - lr_min at the end of an annealing

# No training reaches these, so that a schedule read from a forged file costs neither time nor memory. Python's floats
# count to 2⁵³, and a run directory holds a million members.
_MOST_STEPS, _MOST_MEMBERS, _MOST_MILESTONES = 2**53, 10**6, 1000


class Ops(Protocol):
    """The handful of operations a schedule is made of; `step` may be whatever they accept."""

    # ruff: noqa: D102
    @property
    def cos(self) -> Callable[..., Any]: ...
    @property
    def where(self) -> Callable[..., Any]: ...
    @property
    def minimum(self) -> Callable[..., Any]: ...
    @property
    def mod(self) -> Callable[..., Any]: ...
    @property
    def real(self) -> Callable[..., Any]: ...


class _Python:
    cos = staticmethod(math.cos)
    where = staticmethod(lambda condition, yes, no: yes if condition else no)
    minimum = staticmethod(min)
    mod = staticmethod(operator.mod)
    real = staticmethod(float)


class Schedule:
    """What every schedule can do; a subclass defines `_formula`, `_check`, `cycle_at` and `cycle_starts`."""

    lr: float
    steps: int

    def __post_init__(self) -> None:
        self._check()

    def __call__(self, step: int) -> float:
        """Return the rate of the update about to be done after `step` updates.

        Arguments:
            step: updates done so far, 0 or more; `step >= self.steps` holds the last rate.

        Raises:
            ScheduleError: `step` is negative or no integer.
        """
        return self._rate(min(_update_count(step), self.steps - 1))  # type: ignore[no-any-return]

    def lr_at(self, t: int) -> float:
        """Return the rate of iteration `t` as the paper counts, from 1: `self(t - 1)`."""
        return self(_whole("t", t) - 1)

    def bind(self, ops: Ops, *, clamped: bool = True) -> Callable[[Any], Any]:
        """Return the function step -> rate over `ops`, clamped to 0..steps-1.

        Branches that the values rule out are left out of the function, so its size depends neither on
        the number of cycles nor on options that are not used.

        Arguments:
            ops: holds `cos`, `where(condition, yes, no)`, `minimum`, `mod` (on integers) and `real` (an
                integer as the framework's floating type).
            clamped: False leaves the clamping out, for callers whose framework does it in one operation.

        Example:
            >>> import numpy as np
            >>> from types import SimpleNamespace
            >>> ops = SimpleNamespace(cos=np.cos, where=np.where, minimum=np.minimum, mod=np.mod, real=np.float64)
            >>> rates = CosineCycles(lr=0.2, steps=300, cycles=6).bind(ops)(np.arange(300))
            >>> float(rates[50]), float(rates[75])
            (0.2, 0.1)
        """
        rate, minimum, last = self._formula(ops), ops.minimum, self.steps - 1
        return (lambda step: rate(minimum(-minimum(-step, 0), last))) if clamped else rate

    def cycle_at(self, step: int) -> int:
        """Return the 0-based cycle that update number `step` belongs to; 0 during warm-up.

        Where the rate has no cycles, the updates between two snapshots count as one.

        Raises:
            ScheduleError: `step` is negative or no integer.
        """
        raise NotImplementedError

    @functools.cached_property
    def cycle_starts(self) -> tuple[int, ...]:
        """The step at which each cycle begins; the first one follows the warm-up."""
        raise NotImplementedError

    @property
    def cycle_lengths(self) -> tuple[int, ...]:
        """The updates in each cycle."""
        return tuple(map(operator.sub, self.snapshot_steps, self.cycle_starts))

    @functools.cached_property
    def snapshot_steps(self) -> tuple[int, ...]:
        """The updates done when each snapshot is due: the end of each cycle, before the rate jumps."""
        return (*self.cycle_starts[1:], self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as plain JSON, for `schedule_from_dict`.

        Raises:
            ScheduleError: it has more than a million snapshots, which no run keeps.
        """
        _require_keepable(self)
        values = self.__getstate__().items()
        return {"kind": type(self).__name__, **{n: list(v) if isinstance(v, tuple) else v for n, v in values}}

    @functools.cached_property
    def _rate(self) -> Callable[[Any], Any]:
        return self._formula(_Python())

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _formula(self, ops: Ops) -> Callable[[Any], Any]:
        raise NotImplementedError

    def _check(self) -> None:
        lr, steps = _rate_value("lr", self.lr), _whole("steps", self.steps)
        _require(lr > 0, f"lr must be above 0, got {lr}")
        _require(steps >= 1, f"steps must be 1 or more, got {steps}: count optimizer updates, epochs * len(loader)")
        _require(steps <= _MOST_STEPS, f"steps must be at most {_MOST_STEPS}, got {steps}")
        self._set(lr=lr, steps=steps)


Shape = Callable[[Any, Ops], Any]
"""f(u, ops), which falls from 1 at u = 0 to 0 at u = 1; written over `ops` and arithmetic, so that it can be traced."""


def _linear(u: Any, _: Ops) -> Any:
    return 1.0 - u


def _exponential(u: Any, _: Ops) -> Any:
    return (_FALL**u - _FALL) / (1.0 - _FALL)


_SHAPES: dict[str, Shape] = {"linear": _linear, "exponential": _exponential}


def register_shape(name: str, shape: Shape) -> None:
    """Give a shape of your own a name, by which `Cycles` finds it and a run directory keeps it.

    Arguments:
        name: not that of another shape; the same shape may be registered again.
        shape: f(u, ops), as for `Cycles`.

    Raises:
        ScheduleError: the name is taken, or the shape does not fall from 1 to 0.

    Example:
        >>> register_shape("quadratic", lambda u, ops: (1 - u) * (1 - u))
        >>> Cycles("quadratic", lr=0.4, steps=300, cycles=2)(75)
        0.1
    """
    _check_shape(shape)
    taken = name == "cosine" or _SHAPES.get(name, shape) is not shape
    _require(not taken, f"shape {name!r} is taken: choose another name")
    _SHAPES[name] = shape


class _Annealing(Schedule):
    """Cycles from `lr` down to just above `lr_min`, whatever their shape; a subclass defines `_above`."""

    cycles: int
    lr_min: float
    warmup_steps: int
    remainder: Remainder

    def __post_init__(self) -> None:
        super().__post_init__()
        made, final, left = self._ending(self.steps - self.warmup_steps)
        left = left if self.lr > self.lr_min else 0.0
        if self.remainder == "even" or (made == self.cycles and left <= _ANNEALED):
            return
        long, shortest = self._layout[0], self._shortest
        start = max(self.steps - self.warmup_steps, shortest * self.cycles)
        near = (n for distance in range(self.cycles + 1) for n in (start - distance, start + distance))
        fit = self.warmup_steps + next(n for n in near if self._anneals(n))
        if made == self.cycles and final == long:
            problem = (
                f"makes cycles of length {long}, which end {left:.1%} above lr_min; {shortest} updates or more end "
                f"within {_ANNEALED:.0%}: the nearest steps are {fit}"
            )
        else:
            missing = f"only {made} run, and " if made < self.cycles else ""
            even = ', or pass remainder="even"' if long >= shortest else ""
            problem = (
                f"does not fit {self.cycles} cycles: {missing}the last, {final} of {long} updates, ends {left:.0%} "
                f"above lr_min; the nearest steps that fit are {fit}{even}"
            )
        warnings.warn(f"steps={self.steps} {problem}", CycleWarning, stacklevel=3)

    def _formula(self, ops: Ops) -> Callable[[Any], Any]:
        where, mod, real = ops.where, ops.mod, ops.real
        warmup, lr, floor = self.warmup_steps, self.lr, self.lr_min
        long, short, split = self._layout
        middle = warmup + split
        height = self._above(ops, lr - floor)

        def annealed(step: Any) -> Any:
            if middle == self.steps:
                k, length = mod(step - warmup if warmup else step, long), long
            else:
                first = step < middle
                length = where(first, long, short)
                k, length = mod(step - where(first, warmup, middle), length), real(length)
            above = height(real(k), length)
            return floor + above if floor else above

        def rate(step: Any) -> Any:
            return where(step < warmup, lr * real(step + 1) / (warmup + 1), annealed(step))

        return rate if warmup else annealed

    def _above(self, ops: Ops, span: float) -> Callable[[Any, Any], Any]:
        """Return the function (k, length) -> what update k of a cycle is above the floor, of `span` at its start."""
        raise NotImplementedError

    def cycle_at(self, step: int) -> int:
        long, short, split = self._layout
        k = min(_update_count(step), self.steps - 1) - self.warmup_steps
        return max(k, 0) // long if k < split else split // long + (k - split) // short

    @functools.cached_property
    def cycle_starts(self) -> tuple[int, ...]:
        long, short, split = self._layout
        begin, middle = self.warmup_steps, self.warmup_steps + split
        return (*range(begin, middle, long), *range(middle, self.steps, short))

    @functools.cached_property
    def _layout(self) -> tuple[int, int, int]:
        """Cycles of `long` updates fill the first `split` updates after the warm-up; of `short`, the rest."""
        updates = self.steps - self.warmup_steps
        short, longer = divmod(updates, self.cycles)
        long = short + (longer > 0)
        return long, short, updates if self.remainder == "paper" or not longer else longer * long

    def _ending(self, updates: int) -> tuple[int, int, float]:
        """Return how equation 2 ends: the cycles made, the last one's length, and the share of lr - lr_min left."""
        long = -(-updates // self.cycles)
        made = -(-updates // long)
        final = updates - (made - 1) * long
        return made, final, self._share(final - 1, long)

    def _anneals(self, updates: int) -> bool:
        made, _, left = self._ending(updates)
        return made == self.cycles and left <= _ANNEALED

    def _share(self, k: int, length: int) -> float:
        return self._above(_Python(), 1.0)(float(k), length)  # type: ignore[no-any-return]

    @property
    def _shortest(self) -> int:
        """The shortest cycle that anneals far enough: of a cosine 16, whose last rate is sin²(π/32) of the way up."""
        short, enough = 0, _LONGEST
        while enough - short > 1:
            middle = (short + enough) // 2
            if self._share(middle - 1, middle) <= _ANNEALED:
                enough = middle
            else:
                short = middle
        return enough

    def _check(self) -> None:
        super()._check()
        lr_min, steps = _rate_value("lr_min", self.lr_min), self.steps
        cycles, warmup = _whole("cycles", self.cycles), _whole("warmup_steps", self.warmup_steps)
        _require(lr_min <= self.lr, f"lr_min must be in 0..lr={self.lr}, got {lr_min}")
        _require(0 <= warmup < steps, f"warmup_steps must be in 0..steps-1={steps - 1}, got {warmup}")
        room = f"steps={steps}" if warmup == 0 else f"steps-warmup_steps={steps - warmup}"
        _require(1 <= cycles <= steps - warmup, f"cycles must be in 1..{room}, got {cycles}")
        choices = get_args(Remainder)
        _require(self.remainder in choices, f"remainder must be one of {choices}, got {self.remainder!r}")
        self._set(lr_min=lr_min, cycles=cycles, warmup_steps=warmup)


@dataclass(frozen=True)
class CosineCycles(_Annealing):
    """Anneal the rate along M cosine cycles, each from `lr` down to just above `lr_min`.

    Equation 2 of the paper, with α0 = `lr`, T = `steps`, M = `cycles` and L = ⌈T/M⌉:

        α(t) = α0/2 · (cos(π · mod(t−1, L) / L) + 1),   t = step + 1

    With a floor, α(t) = lr_min + (lr − lr_min)/2 · (cos(…) + 1). With W = `warmup_steps`, the rate
    first climbs as lr·(k+1)/(W+1) for k < W, and the M cycles share the other T − W updates.

    Arguments:
        lr: the rate every cycle starts at, finite and above 0.
        steps: optimizer updates in all, the warm-up included; 1 or more.
        cycles: M, 1 … steps − warmup_steps.
        lr_min: the rate a cycle anneals towards, 0 … lr.
        warmup_steps: updates of linear warm-up before the first cycle; 0 … steps − 1.
        remainder: what happens when M does not divide the updates. `"paper"` keeps the ceiling, so
            the last cycle is cut short; `"even"` makes exactly M cycles whose lengths differ by at
            most one, the longer ones first.

    Raises:
        ScheduleError: a value outside the ranges above.

    Warns:
        CycleWarning: under `"paper"`, when a cycle is missing or the last rate is above lr_min + 1 %
            of (lr − lr_min), so that the last member is not taken at the end of an annealing.

    Example:
        >>> cycles = CosineCycles(lr=0.2, steps=300, cycles=6)
        >>> cycles(0), cycles.lr_at(1), cycles(25)
        (0.2, 0.2, 0.1)
        >>> cycles.snapshot_steps
        (50, 100, 150, 200, 250, 300)

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, equation 2.
    """

    lr: float
    steps: int
    cycles: int
    _: KW_ONLY
    lr_min: float = 0.0
    warmup_steps: int = 0
    remainder: Remainder = "paper"

    def _above(self, ops: Ops, span: float) -> Callable[[Any, Any], Any]:
        return _cosine(ops, span)


@dataclass(frozen=True)
class Cycles(_Annealing):
    """Anneal the rate along M cycles of any shape, the paper's general form: α(t) = f(mod(t−1, ⌈T/M⌉)).

    Update k of a cycle of L has the rate lr_min + (lr − lr_min) · f(k/L), after a warm-up as in `CosineCycles`.

    Arguments:
        shape: `"cosine"`, which is `CosineCycles` to the last bit; `"linear"`, 1 − u; `"exponential"`, which falls by a
            factor of 100 and is shifted to end at 0; a name given by `register_shape`; or a function f(u, ops) that
            falls from 1 at u = 0 to 0 at u = 1, written over arithmetic and `ops` (see `Ops`) alone, so that every
            framework can trace it. Only a name can be kept in a run directory.
        lr: as for `CosineCycles`, as the others.
        steps: optimizer updates in all.
        cycles: M.
        lr_min: the rate a cycle anneals towards.
        warmup_steps: updates of linear warm-up.
        remainder: `"paper"` or `"even"`.

    Raises:
        ScheduleError: no such shape, one that does not fall from 1 to 0, or a value out of range.

    Warns:
        CycleWarning: as for `CosineCycles`. A linear cycle ends within 1 % from 100 updates on.

    Example:
        >>> cycles = Cycles("linear", lr=0.2, steps=600, cycles=6)
        >>> cycles(0), cycles(50), cycles(100)
        (0.2, 0.1, 0.2)

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, equation 1.
    """

    shape: str | Shape
    lr: float
    steps: int
    cycles: int
    _: KW_ONLY
    lr_min: float = 0.0
    warmup_steps: int = 0
    remainder: Remainder = "paper"

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as plain JSON, for `schedule_from_dict`.

        Raises:
            ScheduleError: the shape has no name, or there are more than a million snapshots.
        """
        _require(
            isinstance(self.shape, str),
            "a shape needs a name to be kept in a run: register_shape('mine', f), and Cycles('mine', …)",
        )
        return super().to_dict()

    def _above(self, ops: Ops, span: float) -> Callable[[Any, Any], Any]:
        if self.shape == "cosine":
            return _cosine(ops, span)
        shape = self._known_shape()
        return lambda k, length: span * shape(1.0 * k / length, ops)

    def _known_shape(self) -> Shape:
        if callable(self.shape):
            return self.shape
        if self.shape not in _SHAPES:  # as in a process that has unpickled it, or reads a run that keeps the name
            raise ScheduleError(
                f"shape must be one of cosine, {', '.join(_SHAPES)}, or a function f(u, ops); register_shape gives "
                f"yours a name in this process; got {self.shape!r}"
            )
        return _SHAPES[self.shape]

    def _check(self) -> None:
        if callable(self.shape):
            _check_shape(self.shape)
        elif self.shape != "cosine":
            _require(isinstance(self.shape, str), f"shape must be a name or a function f(u, ops), got {self.shape!r}")
            self._known_shape()
        super()._check()


@dataclass(frozen=True)
class StepDecay(Schedule):
    """Hold the rate and multiply it by `factor` at each milestone: the paper's standard schedule.

    The rate is lr · factor^k once `step >= ceil(milestone_k · steps)`. Snapshot k is due at
    ceil(k · steps / snapshots), which is what the paper's NoCycle ensemble takes.

    Arguments:
        lr: the first rate, finite and above 0.
        steps: optimizer updates in all, 1 or more.
        milestones: shares of the training, each in 0 … 1, not descending.
        factor: what the rate is multiplied by, above 0.
        snapshots: how many, equally spaced, the last at the end; 1 … steps.

    Raises:
        ScheduleError: a value outside the ranges above.

    Example:
        >>> decay = StepDecay(lr=0.1, steps=300, snapshots=6)
        >>> [round(decay(step), 6) for step in (0, 149, 150, 225)]
        [0.1, 0.1, 0.01, 0.001]

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, section 4.
    """

    lr: float
    steps: int
    _: KW_ONLY
    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    snapshots: int = 1

    def _formula(self, ops: Ops) -> Callable[[Any], Any]:
        # Rounding first: 0.07 · 100 is 7, though floating point makes it 7.000000000000001.
        boundaries = [math.ceil(round(share * self.steps, 6)) for share in self.milestones]
        rates = [self.lr * self.factor**k for k in range(len(boundaries) + 1)]

        def rate(step: Any) -> Any:
            value = ops.where(step < self.steps, rates[-1], rates[-1])  # a traced value, milestones or none
            for boundary, before in zip(reversed(boundaries), reversed(rates[:-1]), strict=True):
                value = ops.where(step < boundary, before, value)
            return value

        return rate

    def cycle_at(self, step: int) -> int:
        return min(_update_count(step), self.steps - 1) * self.snapshots // self.steps

    @functools.cached_property
    def cycle_starts(self) -> tuple[int, ...]:
        return tuple(-(-k * self.steps // self.snapshots) for k in range(self.snapshots))

    def _check(self) -> None:
        super()._check()
        factor, snapshots = _rate_value("factor", self.factor), _whole("snapshots", self.snapshots)
        _require(isinstance(self.milestones, Iterable), f"milestones must be shares in 0..1, got {self.milestones!r}")
        milestones = tuple(_rate_value("milestones", share) for share in self.milestones)
        _require(factor > 0, f"factor must be above 0, got {factor}")
        _require(1 <= snapshots <= self.steps, f"snapshots must be in 1..steps={self.steps}, got {snapshots}")
        ascending = all(a <= b for a, b in zip((0.0, *milestones), (*milestones, 1.0), strict=True))
        _require(ascending, f"milestones must be shares in 0..1, not descending, got {milestones}")
        count = len(milestones)
        _require(count <= _MOST_MILESTONES, f"milestones must be at most {_MOST_MILESTONES}, got {count}")
        highest = max(math.log2(self.lr), 0) + count * math.log2(factor)
        _require(highest < 1023, f"lr={self.lr} · factor={factor} ** {count} milestones must be finite")
        self._set(factor=factor, snapshots=snapshots, milestones=milestones)


def schedule_from_dict(values: Mapping[str, Any]) -> Schedule:
    """Return the schedule that `to_dict` described; it does not warn again.

    Raises:
        ScheduleError: an unknown kind, a missing or unknown name, or a value out of range.

    Example:
        >>> schedule_from_dict(StepDecay(lr=0.1, steps=4).to_dict()) == StepDecay(lr=0.1, steps=4)
        True
    """
    kinds: dict[Any, type[Schedule]] = {kind.__name__: kind for kind in (CosineCycles, Cycles, StepDecay)}
    kind = values.get("kind")
    _require(isinstance(kind, str) and kind in kinds, f"kind must be one of {sorted(kinds)}, got {kind!r}")
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name != "kind"}
    names = {field.name for field in fields(kinds[kind])}  # type: ignore[arg-type]
    _require(given.keys() == names, f"{kind} takes {sorted(names)}, got {sorted(given)}")
    schedule = object.__new__(kinds[kind])
    schedule._set(**given)
    schedule._check()
    _require_keepable(schedule)
    return schedule


def _cosine(ops: Ops, span: float) -> Callable[[Any, Any], Any]:
    half, cos, pi = span / 2, ops.cos, math.pi
    return lambda k, length: half * (cos(pi * k / length) + 1)


def _check_shape(shape: Shape) -> None:
    """Raise `ScheduleError` unless a function falls from 1 to 0."""
    _require(callable(shape), f"shape must be a function f(u, ops), got {shape!r}")
    values = [_shape_value(shape, k / _PROBES) for k in range(_PROBES + 1)]
    ends = math.isclose(values[0], 1.0) and math.isclose(values[-1], 0.0, abs_tol=_NOISE)
    _require(ends, f"shape must fall from 1 at u=0 to 0 at u=1, got {values[0]:g} and {values[-1]:g}: scale it")
    rises = [k / _PROBES for k in range(_PROBES) if values[k + 1] > values[k] + _NOISE]
    _require(not rises, f"shape must not rise, got a rise after u={rises[:1]}")
    left = _shape_value(shape, 1 - 1 / _LONGEST)
    _require(left <= _ANNEALED, f"shape must come near 0 before u=1, got {left:g} at the end of {_LONGEST} updates")


def _shape_value(shape: Shape, u: float) -> float:
    try:
        value = float(shape(u, _Python()))
    except (TypeError, ValueError, AttributeError) as error:
        raise ScheduleError(f"shape must be f(u, ops), over arithmetic and ops, and give a number: {error}") from error
    _require(math.isfinite(value), f"shape must give a finite number, got {value!r} at {u}")
    return value


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ScheduleError(message)


def _require_keepable(schedule: Schedule) -> None:
    """Refuse a number of snapshots that would take a reader minutes: in a file it may be forged."""
    state = schedule.__getstate__()
    count = state["cycles"] if "cycles" in state else state["snapshots"]
    _require(count <= _MOST_MEMBERS, f"a schedule is kept with at most {_MOST_MEMBERS} snapshots, got {count}")


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ScheduleError(f"{name} must be an integer, got {value!r}") from None


def _update_count(step: Any) -> int:
    if step.__class__ is int and step >= 0:  # almost always, and asked for at every update
        return step
    count = _whole("step", step)
    if count < 0:
        raise ScheduleError(f"step counts the updates done, 0 or more, got {count}")
    return count


def _rate_value(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ScheduleError(f"{name} must be a number, got {value!r}") from None
    _require(math.isfinite(number) and number >= 0, f"{name} must be finite and not negative, got {number}")
    return number
