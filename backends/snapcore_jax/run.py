"""A run for a training loop of your own: it counts, takes the snapshots, and goes on after a kill."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from snapcore import Program, ProtocolError, Schedule
from snapcore.protocol import OptimizerState
from snapcore.run import CountedRun, Recorder
from snapcore.store import Tensors, read_point
from snapcore_jax.counting import Optimizer, read_count, with_new_moments
from snapcore_jax.distributed import own_group
from snapcore_jax.donation import donated, refuse_unusable
from snapcore_jax.state import Copy, dump_training, load_training, named_leaves, with_leaves

Batch = TypeVar("Batch")
Variables = TypeVar("Variables")
Rest = TypeVar("Rest")

log = logging.getLogger("snapcore")

_MISSING: Any = object()


class SnapshotRun:
    """Take snapshots from a training loop of your own, and go on after a kill.

    JAX's values do not change, so the loop hands them over and goes on with what it gets back: most often the same,
    after a restart others. A snapshot is a copy made on the device before `step` returns, so updates may be given
    (donated) all that they were given before. The rate is the optimizer's own: build it with `snapshot_schedule`.

    An update is what the optimizer counts by its schedules, or with `optax.MultiSteps` by its gradient steps; what
    `optax.apply_if_finite` leaves out is not counted, and one call of `step` may follow several updates of a
    `lax.scan`. That count is read only when the end of a cycle may be reached, so that no update waits for it. Of an
    optimizer without one, calls of `step` count.

    Arguments:
        directory: the run's own; created. In several processes, one that all of them see.
        cycles_or_program: a schedule, or a program from `snapcore.program`.
        resume: go on with an unfinished run that is there; False moves any run aside.
        resume_every: updates between two resume points, beside those at every cycle's end.
        init: for programs with `fresh` restarts: gives variables for a member number.
        optimizer: for programs that reset the optimizer: the `optax.GradientTransformation`, or a function from
            variables to a new optimizer state. Schedules keep their counts.

    Raises:
        StoreError: the directory holds a finished run or another program's, or one that cannot be resumed; is being
            written; or cannot be written.
        ProtocolError: the program needs `init` or `optimizer`, and it is missing.

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
    ) -> None:
        _check_needs(cycles_or_program, optimizer)
        self._optimizer = optimizer
        self._recorder = Recorder(
            directory,
            cycles_or_program,
            self._Source(self, init),
            framework="jax",
            resume=resume,
            resume_every=resume_every,
            group=own_group(),
        )
        self._cursor = self._recorder.cursor
        self._counted = CountedRun(self._recorder, self._read_count, hands_back=True)
        self._variables = self._rest = _MISSING
        self._begun, self._resumable = False, True

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
    def start(self, variables: Any, rest: Any = _MISSING) -> Any:
        """Return what to begin with: what is given, or what was saved if there is something to go on with.

        Arguments:
            variables: all that the forward pass needs, as any tree: Flax NNX modules and states, Linen variables,
                Equinox modules, dictionaries. Random keys in it are saved, but are no part of a member.
            rest: the optimizer's state, random keys, and whatever else the loop goes on with. Without it members are
                taken as ever, but the run cannot be resumed.

        Returns:
            `variables`, or (`variables`, `rest`), of the same structure, dtypes and shardings.

        Raises:
            ProtocolError: it was called before, or after the first `step`; or the program resets the optimizer, and
                there is no `rest`.
            CorruptSnapshotError, DataError: the resume point cannot be read, or does not fit what is given.
        """
        if self._begun:
            raise ProtocolError("run.start is called once, before the first run.step")
        self._begin(variables, rest)
        self._recorder.start()
        if self._resumable:
            self._find_count()
        return self._held()

    @overload
    def step(self, variables: Variables) -> Variables: ...
    @overload
    def step(self, variables: Variables, rest: Rest) -> tuple[Variables, Rest]: ...
    def step(self, variables: Any, rest: Any = _MISSING) -> Any:
        """Record the update just done, take what is due, and return what to go on with.

        Arguments:
            variables: as the update returned them.
            rest: as the update returned it; given always, or never.

        Returns:
            What was given, or after a restart other values of the same structure.

        Raises:
            ProtocolError: an update came after the program had stopped; `rest` is missing, or was before; or an array
                was donated to an update.
            StoreError, DivergedError: an earlier member could not be written or was refused.
            SystemExit: with code 143, after a SIGTERM and its resume point.
        """
        if self._counted.may_be_due() or self._recorder.asked_to_stop:
            refuse_unusable(_parts(variables, rest))
        self._take_in(variables, rest)
        self._recorder.epochs.settle()
        if not self._counted.call():
            self._recorder.record(0)  # raises what the writer has met
            return self._held()
        self._counted.look()
        held = self._held()
        if self.finished:
            self._let_go()
        return held

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's batches, epoch after epoch, until the program stops; after a resume, go on where it was.

        The order is exact if it depends on the random states of NumPy or Python, on a sampler's `set_epoch`, or on
        nothing.
        """
        return self._counted.batches(loader)

    def finish(self, reason: str) -> None:
        """End early, with an unfinished member if an update was done since the last one."""
        refuse_unusable(self._parts())
        self._counted.finish(reason)
        self._let_go()

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
            self._counted.close(exact=exact and not donated(self._parts()))
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Hold nothing: nothing more is copied, and the memory is the loop's."""
        self._variables = self._rest = _MISSING

    def _take_in(self, variables: Any, rest: Any) -> None:
        if not self._begun:
            if read_point(self._recorder.directory) is not None:
                raise ProtocolError(
                    f"{self._recorder.directory} holds an unfinished run: begin with "
                    "variables, rest = run.start(variables, rest), which gives back what was saved"
                )
            self._begin(variables, rest)
            self._counted.begun_at = None if read_count(self._rest_or_nothing()) is None else 0
        if (rest is not _MISSING) != self._resumable:
            raise ProtocolError(
                "give run.step the rest (optimizer state, keys) at every update and at run.start, or never"
            )
        self._variables, self._rest = variables, rest

    def _begin(self, variables: Any, rest: Any) -> None:
        self._resumable = rest is not _MISSING
        if not self._resumable:
            if self._recorder.program.between.optimizer == "reset":
                raise ProtocolError(
                    f"{self._recorder.program.method} resets the optimizer: give run.start its state too"
                )
            log.warning(
                "%s: without the optimizer's state this run cannot be resumed; pass it as rest: "
                "variables, rest = run.start(variables, rest)",
                self._recorder.directory,
            )
        self._variables, self._rest = variables, rest
        self._begun = True

    def _find_count(self) -> None:
        count = read_count(self._rest)
        self._counted.begun_at = None if count is None else count - self._cursor.step
        if self._counted.begun_at:
            log.warning(
                "%s: the optimizer has counted %d updates that this run has not seen; its schedule is that far ahead",
                self._recorder.directory,
                self._counted.begun_at,
            )

    def _held(self) -> Any:
        return (self._variables, self._rest) if self._resumable else self._variables

    def _parts(self) -> dict[str, Any]:
        return _parts(self._variables, self._rest)

    def _rest_or_nothing(self) -> Any:
        return self._rest if self._resumable else ()

    def _read_count(self) -> int | None:
        refuse_unusable(self._parts())
        return read_count(self._rest)

    class _Source:
        """What is being trained, as the recorder sees it."""

        def __init__(self, run: "SnapshotRun", init: Callable[[int], Any] | None) -> None:
            self._run, self._init = run, init

        @property
        def fresh(self) -> Callable[[int], Copy] | None:
            init = self._init
            return None if init is None else lambda member: Copy(named_leaves(init(member), random=False))

        def capture(self) -> Copy:
            return Copy(named_leaves(self._run._variables, random=False))

        def restore(self, tensors: Tensors | None, *, optimizer: OptimizerState) -> None:
            run = self._run
            if tensors is not None:
                run._variables = with_leaves(run._variables, tensors, "a restart's member", random=False)
            if optimizer == "reset":
                run._rest = with_new_moments(run._optimizer, run._variables, run._rest)

        def dump(self) -> tuple[Copy, dict[str, Any]] | None:
            run = self._run
            return (dump_training(run._variables, run._rest), {}) if run._resumable else None

        def load(self, tensors: Tensors, values: dict[str, Any]) -> None:  # noqa: ARG002
            run = self._run
            run._variables, run._rest = load_training(run._variables, run._rest_or_nothing(), tensors)

        def random_state(self) -> None:
            """Nothing: JAX's keys are among the arrays."""

        def set_random_state(self, state: Any) -> None:
            """Nothing to set."""


def _check_needs(program: Schedule | Program, optimizer: object) -> None:
    if isinstance(program, Program) and program.between.optimizer == "reset" and optimizer is None:
        raise ProtocolError(
            f"{program.method} resets the optimizer between members: pass optimizer=, the optax transformation, or a "
            "function from variables to a new optimizer state"
        )


def _parts(variables: Any, rest: Any) -> dict[str, Any]:
    return {name: part for name, part in (("variables", variables), ("rest", rest)) if part is not _MISSING}
