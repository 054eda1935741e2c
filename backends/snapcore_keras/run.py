"""A run that follows a Keras model by its optimizer's own count: what the callback and TensorFlow's loop share."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import keras

from snapcore import Program, ProtocolError, Schedule
from snapcore.protocol import Event, OptimizerState, as_program
from snapcore.run import CountedRun, Position, Recorder
from snapcore.store import MANIFEST, Tensors
from snapcore_keras.schedule import (
    accumulation,
    check_begin,
    check_rate,
    counted,
    gradients,
    innermost,
    set_accumulation,
)
from snapcore_keras.state import (
    Copy,
    dump_training,
    fingerprint,
    load_training,
    load_weights,
    named_weights,
    random_state,
    reset_moments,
    set_random_state,
    settings,
)

FreshWeights = Callable[[int], "keras.Model | Tensors"]
"""Gives fresh weights for a member number: a model, or arrays by the names of a member."""


class KerasRun(CountedRun):
    """Walk a program along the updates that an optimizer counts; keep members and resume points.

    Arguments:
        directory: the run's own.
        cycles_or_program: what to walk.
        model: built.
        optimizer: its optimizer; built here if it is not.
        resume: resume an unfinished run that is there; False moves any run aside.
        at: where a trainer that keeps checkpoints of its own is.
        init: for programs with `fresh` restarts.
        per_call: gradients that every call gives to the optimizer, at most; None if that is not known.
        check_begin_at: called with what the optimizer had counted when the run had done no update, to refuse that.
            Where there is nothing to resume, it is called before a run is moved aside. By default it is refused if the
            schedule does not begin there; if it is accepted, the run begins where the schedule does.
        check: as in `CountedRun`.
        used_rate: as in `CountedRun`.
        scope: the strategy's, in which the model's values are read and set.
        **options: more of the recorder's, its `framework` among them.

    Raises:
        ProtocolError: the program needs `init`, and it is missing; the optimizer's schedule is not where the run is; or
            the optimizer was built for another model.
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
        resume: bool = True,
        at: Position | None = None,
        init: FreshWeights | None = None,
        per_call: int | None = None,
        check_begin_at: Callable[[int], None] | None = None,
        check: Callable[[int, int], None] | None = None,
        used_rate: Callable[[int], tuple[float, str] | None] = lambda _: None,
        scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> None:
        program = as_program(cycles_or_program)
        named_weights(model)
        _check_owned(model, optimizer)
        set_accumulation(optimizer)
        rate = check_rate(optimizer, program.schedule)
        check_begin_at = check_begin_at or (lambda before: check_begin(rate, before))
        resumed_elsewhere = at is not None and at.step > 0
        if not resumed_elsewhere and not (resume and (Path(directory) / MANIFEST).exists()):
            check_begin_at(counted(optimizer))
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self.values: dict[str, Any] = {}
        """Plain JSON that resume points keep."""
        recorder = Recorder(
            directory,
            program,
            _Source(model, optimizer, init, scope, self.values),
            resume=resume,
            at=at,
            **options,
        )
        try:
            recorder.start()
            parts = 1 if per_call is None else accumulation(optimizer)
            super().__init__(
                recorder,
                lambda: counted(optimizer),
                per_call=per_call,
                accumulation=parts,
                unfinished=lambda: gradients(optimizer) % parts if parts > 1 else 0,
                check=check,
                used_rate=used_rate,
            )
            before = counted(optimizer) - self.cursor.step
            check_begin_at(before)
            schedule = check_rate(optimizer, program.schedule)
            self.begun_at = before if schedule is None else schedule.begin
        except BaseException:
            recorder.close(exact=False)
            raise
        self._model, self._optimizer = model, optimizer
        self._at_start: tuple[bytes, ...] | None = fingerprint(model.trainable_weights)

    def look(self, *, unseen: int = 0) -> tuple[Event, ...]:
        """Read the count, move the run there, and return what was due.

        Raises:
            ProtocolError: as `CountedRun.look`; or the weights have moved and the optimizer has counted nothing: it is
                another that trains them.
        """
        if self._at_start is not None and self._new():
            self._at_start = None
        if self._at_start is not None and fingerprint(self._model.trainable_weights) != self._at_start:
            raise ProtocolError(
                f"the weights have moved, and {self._optimizer.name} has counted no update: pass optimizer=, the "
                "optimizer that trains them"
            )
        return super().look(unseen=unseen)


def check_kinds(model: Any, optimizer: Any) -> None:
    """Refuse what is not Keras 3's, such as a model of `tf_keras`.

    Raises:
        ProtocolError: naming the type.
    """
    for value, kind, name in ((model, keras.Layer, "model"), (optimizer, keras.optimizers.Optimizer, "optimizer")):
        if not isinstance(value, kind):
            came = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
            raise ProtocolError(f"one Keras 3 {name} is followed, got {came}: build it with `import keras`")


def _check_owned(model: Any, optimizer: Any) -> None:
    own = {id(variable) for variable in model.variables}
    other = next((each for each in innermost(optimizer)._trainable_variables if id(each) not in own), None)
    if other is not None:
        raise ProtocolError(
            f"{optimizer.name} was built for variables that {model.name} does not have, such as {other.path}: give a "
            "new optimizer, or the model that has them"
        )


class _Source:
    """What is being trained, as the recorder sees it."""

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        init: FreshWeights | None,
        scope: Callable[[], AbstractContextManager[Any]],
        values: dict[str, Any],
    ) -> None:
        self._model, self._optimizer, self._init, self._scope = model, optimizer, init, scope
        self._values = values

    @property
    def fresh(self) -> Callable[[int], Copy | Tensors] | None:
        init = self._init
        if init is None:
            return None

        def fresh(member: int) -> Copy | Tensors:
            with self._scope():
                weights = init(member)
                return weights if isinstance(weights, Mapping) else Copy(named_weights(weights))

        return fresh

    def capture(self) -> Copy:
        with self._scope():
            return Copy(named_weights(self._model))

    def restore(self, tensors: Tensors | None, *, optimizer: OptimizerState) -> None:
        with self._scope():
            if tensors is not None:
                load_weights(self._model, tensors, "a restart's member")
            if optimizer == "reset":
                reset_moments(self._optimizer)

    def dump(self) -> tuple[Copy, dict[str, Any]]:
        with self._scope():
            return dump_training(self._model, self._optimizer), dict(self._values)

    def load(self, tensors: Tensors, values: dict[str, Any]) -> None:
        with self._scope():
            load_training(self._model, self._optimizer, tensors)
        self._values.update(values)

    def settings(self) -> dict[str, Any]:
        return settings(self._optimizer)

    def random_state(self) -> dict[str, Any] | None:
        return random_state()

    def set_random_state(self, state: dict[str, Any] | None) -> None:
        set_random_state(state)
