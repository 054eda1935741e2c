"""A run for a training loop of your own: it counts, takes the snapshots, and resumes after a kill."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from snapcore import Program, ProtocolError, Schedule
from snapcore.protocol import Snapshot, as_program
from snapcore.run import CountedRun, EpochBatches, Recorder
from snapcore.store import read_point
from snapcore_jax.counting import (
    Optimizer,
    follows_schedule,
    injected_rates,
    number,
    read_count,
    read_other_counts,
    refuse_strangers,
)
from snapcore_jax.distributed import own_group
from snapcore_jax.donation import donated, refuse_unusable
from snapcore_jax.schedule import ASKED, refuse_uncountable
from snapcore_jax.source import MISSING, Source, parts_of
from snapcore_jax.state import sums

Batch = TypeVar("Batch")
Variables = TypeVar("Variables")
Rest = TypeVar("Rest")

log = logging.getLogger("snapcore")


class SnapshotRun:
    """Take snapshots from a training loop of your own, and resume after a kill.

    JAX's values do not change, so the loop hands them over and uses what it gets back: most often the same values,
    after a restart others. A snapshot is a copy made on the device before `step` returns, so updates may be given
    (donated) all that they were given before. The rate is the optimizer's own: build it with `snapshot_schedule`.

    An update is what the optimizer counts by its schedules, or with `optax.MultiSteps` by its gradient steps; what
    `optax.apply_if_finite` leaves out is not counted, and one call of `step` may follow several updates of a
    `lax.scan`. That count is read only when the end of a cycle may be reached, so that no update waits for it. Of an
    optimizer without one, calls of `step` count. Counts that contradict each other are refused, never chosen from.

    Arguments:
        directory: the run's own; created. In several processes, one that all of them see.
        cycles_or_program: a schedule, or a program from `snapcore.program`.
        resume: resume an unfinished run that is there; False moves any run aside.
        resume_every: updates between two resume points, beside those at every cycle's end.
        init: for programs with `fresh` restarts: gives variables for a member number.
        optimizer: for programs that reset the optimizer: the `optax.GradientTransformation`, or a function from
            variables to a new optimizer state. Schedules keep their counts.
        count: gives the optimizer's count of its updates from `rest`, where that is not to be found, or not the only
            one: `lambda rest: rest["generator"][1].count`. None counts calls of `step`.
        rate: the learning rate that the optimizer was built with, if it is neither `snapshot_schedule` of this
            schedule nor kept in `rest` by `optax.inject_hyperparams`: a number, or a function of the count of updates.
            `rate=cycles` says that the loop applies the schedule's rates itself.
        state: more objects for resume points, by name, with `state_dict` and `load_state_dict` or with `get_state` and
            `set_state`, as Grain's iterators have. A loader among them is taken to know its own position.
        on_member: called with the `Snapshot` of each member as it is taken.
        metrics: gives what to record with a member, by name; called with its `Snapshot`.

    Raises:
        StoreError: the directory holds a finished run or another program's, or one that cannot be resumed; is being
            written; or cannot be written.
        ProtocolError: the program needs `init` or `optimizer`, and it is missing.
        ScheduleError: there are more updates than optax can count.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, optax
        >>> from snapcore import CosineCycles
        >>> from snapcore_jax import snapshot_schedule
        >>> cycles = CosineCycles(lr=0.1, steps=64, cycles=4)
        >>> tx = optax.sgd(snapshot_schedule(cycles), momentum=0.9)
        >>> @jax.jit
        ... def update(params, state, x):
        ...     grads = jax.grad(lambda params: jnp.square(x @ params["w"]).mean())(params)
        ...     updates, state = tx.update(grads, state)
        ...     return optax.apply_updates(params, updates), state
        >>> params = {"w": jnp.ones((4, 2))}
        >>> with tempfile.TemporaryDirectory() as folder, SnapshotRun(folder, cycles) as run:
        ...     params, state = run.start(params, tx.init(params))
        ...     for x in run.batches([jnp.ones((8, 4))]):
        ...         params, state = run.step(*update(params, state, x))
        >>> run.updates, run.finished
        (64, True)
    """

    def __init__(
        self,
        directory: str | Path,
        cycles_or_program: Schedule | Program,
        *,
        resume: bool = True,
        resume_every: int | None = None,
        init: Callable[[int], Any] | None = None,
        optimizer: Optimizer | None = None,
        count: Callable[[Any], Any] | None = read_count,
        rate: float | Callable[[Any], Any] | None = None,
        state: Mapping[str, Any] | None = None,
        on_member: Callable[[Snapshot], object] | None = None,
        metrics: Callable[[Snapshot], Mapping[str, float] | None] | None = None,
    ) -> None:
        program = as_program(cycles_or_program)
        if program.between.optimizer == "reset" and optimizer is None:
            raise ProtocolError(
                f"{program.method} resets the optimizer between members: pass optimizer=, the optax transformation, or "
                "a function from variables to a new optimizer state"
            )
        refuse_uncountable(program.schedule)
        self._count, self._rate = count, rate
        self._source = Source(init, optimizer, state)
        self._recorder = Recorder(
            directory,
            cycles_or_program,
            self._source,
            framework="jax",
            resume=resume,
            resume_every=resume_every,
            group=own_group(),
            on_member=on_member,
            metrics=metrics,
        )
        self._cursor = self._recorder.cursor
        self._counted = CountedRun(
            self._recorder, self._read_count, hands_back=True, check=self._check, used_rate=self._used_rate
        )
        self._begun = self._rate_checked = False
        self._sums: dict[str, float] | None = None
        self._others: tuple[int, list[int]] | None = None

    @property
    def updates(self) -> int:
        """Updates done, as of the last `step`; asking waits for that update."""
        return self._counted.updates if self._counted.waiting else self._cursor.step

    @property
    def finished(self) -> bool:
        """Whether the program has stopped."""
        return self._cursor.finished

    @property
    def lr(self) -> float:
        """The schedule's rate for the next update; asking waits for the last one."""
        return self._cursor.schedule(self.updates)

    @overload
    def start(self, variables: Variables) -> Variables: ...
    @overload
    def start(self, variables: Variables, rest: Rest) -> tuple[Variables, Rest]: ...
    def start(self, variables: Any, rest: Any = MISSING) -> Any:
        """Return what to begin with: what is given, or what was saved if there is a run to resume.

        Arguments:
            variables: all that the forward pass needs, as any tree: Flax NNX modules and states, Linen variables,
                Equinox modules, dictionaries. Random keys in it are saved, but are no part of a member.
            rest: the optimizer's state, random keys, and whatever else the loop carries. Without it members are
                taken as ever, but the run cannot be resumed.

        Returns:
            `variables`, or (`variables`, `rest`), of the same structure, dtypes and shardings.

        Raises:
            ProtocolError: it was called before, or after the first `step`; the program resets the optimizer, and there
                is no `rest`; `rest` is the state for other weights; or the updates in it cannot be counted.
            StoreError: the run was trained by another optimizer, or an array is of a type that no file can hold.
            CorruptSnapshotError, DataError: the resume point cannot be read, or does not fit what is given.
        """
        if self._begun:
            raise ProtocolError("run.start is called once, before the first run.step")
        refuse_unusable(parts_of(variables, rest))
        self._begin(variables, rest)
        refuse_strangers(variables, self._source.rest_or_nothing)
        self._recorder.start()
        if self._source.resumable:
            count = self._read_count()
            self._counted.begun_at = None if count is None else count - self._cursor.step
            if self._counted.begun_at:
                log.warning(
                    "%s: the optimizer has counted %d updates that this run has not seen; its schedule is that far "
                    "ahead",
                    self._recorder.directory,
                    self._counted.begun_at,
                )
            self._sums = None if count is None else sums(self._source.variables)
            self._note_other_counts()
        return self._source.hand_back()

    @overload
    def step(self, variables: Variables) -> Variables: ...
    @overload
    def step(self, variables: Variables, rest: Rest) -> tuple[Variables, Rest]: ...
    def step(self, variables: Any, rest: Any = MISSING) -> Any:
        """Record the update just done, take what is due, and return what to continue with.

        Arguments:
            variables: as the update returned them.
            rest: as the update returned it; given always, or never.

        Returns:
            What was given, or after a restart other values of the same structure.

        Raises:
            ProtocolError: an update came after the program had stopped; `rest` is missing, or was before; an array was
                donated to an update; or the updates cannot be counted.
            StoreError, DivergedError: an earlier member could not be written or was refused.
            SystemExit, KeyboardInterrupt: after a SIGTERM (with code 143) or a Ctrl-C, and its resume point.

        Warns:
            CycleWarning: once, if an update was done at another rate than the schedule's.
        """
        if self._counted.may_be_due() or self._recorder.asked_to_stop:
            refuse_unusable(parts_of(variables, rest))
        self._take_in(variables, rest)
        self._recorder.epochs.settle()
        if not self._counted.call():
            self._recorder.record(0)  # raises what the writer has met
            return self._source.hand_back()
        self._counted.look()
        self._note_other_counts()
        held = self._source.hand_back()
        if self.finished:
            self._source.let_go()
        return held

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's batches, epoch after epoch, until the program stops; after a resume, from where it was.

        The order is exact if it is drawn when an epoch begins: from the random states of Python, NumPy or PyTorch, or
        from a generator in the loader, its data set or its samplers; if it depends on `set_epoch`, or on numbers that
        the loader counts itself; if a `tf.data.Dataset` shuffles with a seed; or if it is kept in the loader's own
        state, given in `state=`.

        Raises:
            ProtocolError: a `tf.data.Dataset` is shuffled without a seed, or was walked before the run was resumed.
        """
        epoch = self._recorder.epochs.state_dict()["epoch"]
        return self._counted.batches(self._source.use(loader, epoch), stateful=self._source.is_stateful(loader))

    def epochs(self, loader: Iterable[Batch]) -> Iterator[tuple[int, EpochBatches[Batch]]]:
        """Yield each epoch's number, from 0, and its batches, until the program stops; see `batches`.

        After a resume the first is the epoch that was under way, with the batches that are left of it.
        """
        epoch = self._recorder.epochs.state_dict()["epoch"]
        return self._counted.epochs_of(self._source.use(loader, epoch), stateful=self._source.is_stateful(loader))

    def finish(self, reason: str) -> None:
        """End early, with an unfinished member if an update was done since the last one."""
        refuse_unusable(self._source.parts)
        self._counted.finish(reason)
        self._source.let_go()

    def close(self) -> None:
        """Wait for the writer and raise its error, if it has one; a run left early may be opened again."""
        self._close(exact=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(exact=kind is None)

    def _close(self, *, exact: bool) -> None:
        try:
            # With an array donated, the loop was left between an update and its step.
            self._counted.close(exact=exact and not donated(self._source.parts))
        finally:
            self._source.let_go()

    def _take_in(self, variables: Any, rest: Any) -> None:
        if not self._begun:
            if read_point(self._recorder.directory) is not None:
                raise ProtocolError(
                    f"{self._recorder.directory} holds an unfinished run: begin with "
                    "variables, rest = run.start(variables, rest), which gives back what was saved"
                )
            self._begin(variables, rest)
            self._source.rest = rest
            self._counted.begun_at = None if self._read_count() is None else 0
        if (rest is not MISSING) != self._source.resumable:
            raise ProtocolError(
                "give run.step the rest (optimizer state, keys) at every update and at run.start, or never"
            )
        self._source.variables, self._source.rest = variables, rest

    def _begin(self, variables: Any, rest: Any) -> None:
        self._source.resumable = rest is not MISSING
        if not self._source.resumable:
            if self._recorder.program.between.optimizer == "reset":
                raise ProtocolError(
                    f"{self._recorder.program.method} resets the optimizer: give run.start its state too"
                )
            log.warning(
                "%s: without the optimizer's state this run cannot be resumed; pass it as rest: "
                "variables, rest = run.start(variables, rest)",
                self._recorder.directory,
            )
        self._source.variables, self._source.rest = variables, rest
        self._begun = True

    def _read_count(self) -> int | None:
        refuse_unusable(self._source.parts)
        if self._count is None:
            return None
        count = self._count(self._source.rest_or_nothing)
        return None if count is None else number(count)

    def _check(self, new: int, calls: int) -> None:  # noqa: ARG002
        """Refuse updates that are not seen or not counted right; see once that they have the schedule's rates."""
        if new == 0:
            self._refuse_unseen()
            return
        self._sums = None
        if self._counted.begun_at is None and self._count is not None and self._others is not None:
            step, before = self._others
            counted = self._cursor.step + new - step
            for count, earlier in zip(read_other_counts(self._source.rest_or_nothing), before, strict=True):
                if count - earlier != counted:
                    raise ProtocolError(
                        f"{counted} calls of run.step have come, but the optimizer has counted {count - earlier} "
                        "updates: pass count=, a function from rest to its count, or count=None to count calls"
                    )
        if not self._rate_checked:
            self._rate_checked = True
            self._check_rate_is_known(self._cursor.step + new - 1)

    def _refuse_unseen(self) -> None:
        """Refuse an optimizer's state that has counted nothing, while all of the weights have changed."""
        before, self._sums = self._sums, None
        now = sums(self._source.variables) if before else {}
        if before and not any(before.get(name) == value for name, value in now.items()):
            raise ProtocolError(
                "all weights have changed, but the optimizer's state in `rest` has counted no update: give run.step "
                "the new state that the update returned"
            )

    def _note_other_counts(self) -> None:
        """Remember what Adam and its like have counted, to compare with the calls that come."""
        if self._counted.begun_at is None and self._count is not None and not self.finished:
            self._others = self._cursor.step, read_other_counts(self._source.rest_or_nothing)

    def _check_rate_is_known(self, step: int) -> None:
        schedule = self._recorder.program.schedule
        if not self._source.resumable or schedule in ASKED or self._used_rate(step) is not None:
            return
        follows = follows_schedule(self._source.rest)
        does = "follows another schedule than this run's" if follows else "does not ask for this run's rates"
        raise ProtocolError(
            f"the optimizer {does}: build it with snapshot_schedule(cycles), or pass rate=, what it was built with, or "
            "rate=cycles if the loop applies them"
        )

    def _used_rate(self, step: int) -> tuple[float, str] | None:
        """Return the rate of the update after `step` others, and who sets it; None if it cannot be known."""
        schedule, begun_at = self._recorder.program.schedule, self._counted.begun_at
        if self._rate is not None:
            rate = self._rate((begun_at or 0) + step) if callable(self._rate) else self._rate
            return float(rate), "what was passed as rate="
        planned = schedule(step)
        rates = injected_rates(self._source.rest_or_nothing)
        if rates:
            used, rounding = min(rates, key=lambda each: abs(each[0] - planned))
            near = abs(used - planned) <= rounding * schedule.lr
            return planned if near else used, "the learning_rate of optax.inject_hyperparams"
        if schedule not in ASKED and len(ASKED) == 1 and begun_at is not None:
            (other,) = ASKED
            return other(begun_at + step), f"snapshot_schedule({other})"
        return None
