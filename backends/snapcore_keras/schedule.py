"""A schedule's rate as Keras takes it: evaluated inside the compiled update, on whichever backend Keras runs."""

import copy
from typing import Any

import keras
from keras import ops

from snapcore import Program, ProtocolError, Schedule, ScheduleError, schedule_from_dict
from snapcore.protocol import as_program


class _Ops:
    """The operations of `Schedule.bind`.

    Arguments:
        counts: the integer type of the steps, which differs by Keras' backend.
    """

    cos = staticmethod(ops.cos)
    minimum = staticmethod(ops.minimum)
    mod = staticmethod(ops.mod)

    def __init__(self, counts: str) -> None:
        self._counts = counts

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        return ops.where(condition, self._typed(yes), self._typed(no))

    @staticmethod
    def real(value: Any) -> Any:
        # Never Keras' half types, in which a cycle has but a few hundred rates.
        return ops.cast(value, "float64" if keras.config.floatx() == "float64" else "float32")

    def _typed(self, value: Any) -> Any:
        return ops.convert_to_tensor(value, self._counts) if type(value) is int else value


@keras.saving.register_keras_serializable(package="snapcore")
class SnapshotSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """The schedule as a learning rate of a Keras optimizer: a function of its count of updates.

    The rate is equation 2's up to the rounding of float32, also where Keras' float type is narrower; cycles are found
    in integers. It is saved and loaded with the model.

    Arguments:
        cycles: such as `snapcore.CosineCycles`; of a program, its schedule.
        begin: what the optimizer has counted when the schedule begins, 0 or more.
        gradient_accumulation_steps: that of the optimizer, 1 or more: Keras hands a schedule its micro-batches. None
            for what the optimizer says, which the run then sets; 1 without a run.

    Raises:
        ScheduleError: a number is out of range.
        ProtocolError: `cycles` is neither a schedule nor a program.

    Example:
        >>> import keras
        >>> from snapcore import CosineCycles
        >>> rate = SnapshotSchedule(CosineCycles(lr=0.2, steps=300, cycles=6))
        >>> round(float(rate(25)), 6), round(float(rate(50)), 6)
        (0.1, 0.2)
        >>> optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, equation 2.
    """

    def __init__(
        self, cycles: Schedule | Program, *, begin: int = 0, gradient_accumulation_steps: int | None = None
    ) -> None:
        if begin < 0 or (gradient_accumulation_steps is not None and gradient_accumulation_steps < 1):
            raise ScheduleError(
                f"begin must be 0 or more and gradient_accumulation_steps 1 or more, got {begin} and "
                f"{gradient_accumulation_steps}"
            )
        self.cycles = as_program(cycles).schedule
        self.begin = begin
        self.gradient_accumulation_steps = gradient_accumulation_steps

    def __call__(self, step: Any) -> Any:
        """Return the rate of the update about to be done, a scalar tensor: float64 if Keras' float type is, or float32.

        Arguments:
            step: what the optimizer has counted: an integer, or an integer variable or tensor.
        """
        step = ops.convert_to_tensor(step)
        counts = keras.backend.standardize_dtype(step.dtype)
        if self._accumulation > 1:
            step = ops.floor_divide(step, self._accumulation)
        done = ops.clip(step - self.begin, 0, self.cycles.steps - 1)
        return self.cycles.bind(_Ops(counts), clamped=False)(ops.cast(done, counts))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments as plain JSON."""
        return {
            "cycles": self.cycles.to_dict(),
            "begin": self.begin,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SnapshotSchedule":
        """Return the schedule that `get_config` described."""
        return cls(**{**config, "cycles": schedule_from_dict(config["cycles"])})

    @property
    def _accumulation(self) -> int:
        return self.gradient_accumulation_steps or 1


@keras.saving.register_keras_serializable(package="snapcore")
class GivenSchedule(SnapshotSchedule):
    """What a run has given to an optimizer instead of a plain rate, so that the next run may replace it."""


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that does the updates, be it within one that scales the loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def accumulation(optimizer: Any) -> int:
    """Return the gradients that make an update."""
    return innermost(optimizer).gradient_accumulation_steps or 1


def counted(optimizer: Any) -> int:
    """Return the updates that an optimizer has counted, 0 before it is built; this waits for the one being done."""
    # Of a copy: JAX may keep what the host has seen, and then the next update cannot take over its memory.
    return int(ops.convert_to_numpy(ops.copy(innermost(optimizer).iterations)))


def gradients(optimizer: Any) -> int:
    """Return the gradients that an optimizer has been given: its updates, or the parts that they are made of."""
    count = next(each for each in innermost(optimizer).variables if each.name == "iteration")
    return int(ops.convert_to_numpy(ops.copy(count)))


def has_plain_rate(optimizer: Any) -> bool:
    """Return whether the rate is a number, which can be set."""
    return isinstance(_rate_of(optimizer), keras.Variable)


def given_schedule(optimizer: Any) -> GivenSchedule | None:
    """Return what an earlier run has given instead of a plain rate, or None."""
    rate = _rate_of(optimizer)
    return rate if isinstance(rate, GivenSchedule) else None


def give_schedule(optimizer: Any, cycles: Schedule, begin: int) -> None:
    """Replace a plain rate by a schedule; functions traced before do not see it."""
    innermost(optimizer).learning_rate = GivenSchedule(
        cycles, begin=begin, gradient_accumulation_steps=accumulation(optimizer)
    )


def set_accumulation(optimizer: Any) -> bool:
    """Have the optimizer's `SnapshotSchedule` know how many gradients make an update, unless it says so itself.

    Only for an optimizer that has counted no update: earlier ones would have had other rates. The schedule that it was
    built with is left alone; the optimizer is given a copy.

    Returns:
        Whether it was set; functions traced before do not see it.
    """
    rate, parts = _rate_of(optimizer), accumulation(optimizer)
    unset = isinstance(rate, SnapshotSchedule) and rate.gradient_accumulation_steps is None
    if not unset or parts == 1 or counted(optimizer):
        return False
    own = copy.copy(rate)
    own.gradient_accumulation_steps = parts
    innermost(optimizer).learning_rate = own
    return True


def check_begin(rate: SnapshotSchedule | None, before: int) -> None:
    """Refuse a schedule that does not begin where the run does.

    Arguments:
        rate: the optimizer's; None for a plain rate.
        before: what the optimizer had counted when the run had done no update.

    Raises:
        ProtocolError: naming `begin`.
    """
    if rate is not None and rate.begin != before:
        raise ProtocolError(
            f"the optimizer has counted {before} updates that this run has not seen, and its schedule begins after "
            f"{rate.begin}: compile with a new optimizer, or pass SnapshotSchedule(…, begin={before})"
        )


def check_rate(optimizer: Any, cycles: Schedule) -> SnapshotSchedule | None:
    """Return the optimizer's `SnapshotSchedule`, or None if it has a plain rate.

    Raises:
        ScheduleError: it has another schedule, or one of other cycles, or counts micro-batches otherwise.
    """
    rate, parts = _rate_of(optimizer), accumulation(optimizer)
    if has_plain_rate(optimizer):
        return None
    if not isinstance(rate, SnapshotSchedule):
        raise ScheduleError(
            f"the optimizer has a schedule of its own, {getattr(rate, '__name__', type(rate).__name__)}: build it with "
            "SnapshotSchedule(cycles), or with a plain rate, which is then set"
        )
    if rate.cycles != cycles:
        raise ScheduleError(
            f"the optimizer's schedule is {rate.cycles}, the run's is {cycles}: build both with the same cycles"
        )
    if rate._accumulation != parts:
        raise ScheduleError(
            f"the optimizer accumulates {parts} gradients for an update, and its schedule counts {rate._accumulation}: "
            f"build a new optimizer with SnapshotSchedule(…, gradient_accumulation_steps={parts})"
        )
    return rate


def _rate_of(optimizer: Any) -> Any:
    # What the public `learning_rate` gives is a number, and to describe a schedule Keras imports TensorFlow.
    return innermost(optimizer)._learning_rate
