"""A schedule's rate as Keras takes it: evaluated inside the compiled update, on whichever backend Keras runs."""

from typing import Any

import keras
from keras import ops

from snapcore import Schedule, ScheduleError, schedule_from_dict


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
        return ops.cast(value, keras.config.floatx())

    def _typed(self, value: Any) -> Any:
        return ops.convert_to_tensor(value, self._counts) if type(value) is int else value


@keras.saving.register_keras_serializable(package="snapcore")
class SnapshotSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """The schedule as a learning rate of a Keras optimizer: a function of its count of updates.

    The rate is equation 2's up to the rounding of float32; cycles are found in integers. It is saved and loaded with
    the model.

    Arguments:
        cycles: such as `snapcore.CosineCycles`.
        begin: what the optimizer has counted when the schedule begins, 0 or more.
        gradient_accumulation_steps: that of the optimizer, 1 or more: Keras hands a schedule its micro-batches.

    Raises:
        ScheduleError: a number is out of range.

    Example:
        >>> import keras
        >>> from snapcore import CosineCycles
        >>> rate = SnapshotSchedule(CosineCycles(lr=0.2, steps=300, cycles=6))
        >>> float(rate(25)), float(rate(50))
        (0.10000000149011612, 0.20000000298023224)
        >>> optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, equation 2.
    """

    def __init__(self, cycles: Schedule, *, begin: int = 0, gradient_accumulation_steps: int = 1) -> None:
        if begin < 0 or gradient_accumulation_steps < 1:
            raise ScheduleError(
                f"begin must be 0 or more and gradient_accumulation_steps 1 or more, got {begin} and "
                f"{gradient_accumulation_steps}"
            )
        self.cycles = cycles
        self.begin = begin
        self.gradient_accumulation_steps = gradient_accumulation_steps

    def __call__(self, step: Any) -> Any:
        """Return the rate of the update about to be done, a scalar tensor of Keras' float type.

        Arguments:
            step: what the optimizer has counted: an integer, or an integer variable or tensor.
        """
        step = ops.convert_to_tensor(step)
        counts = keras.backend.standardize_dtype(step.dtype)
        if self.gradient_accumulation_steps > 1:
            step = ops.floor_divide(step, self.gradient_accumulation_steps)
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


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that does the updates, be it within one that scales the loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def has_plain_rate(optimizer: Any) -> bool:
    """Return whether the rate is a number, which can be set."""
    return isinstance(_rate_of(optimizer), keras.Variable)


def check_rate(optimizer: Any, cycles: Schedule) -> SnapshotSchedule | None:
    """Return the optimizer's `SnapshotSchedule`, or None if it has a plain rate.

    Raises:
        ScheduleError: it has another schedule, or one of other cycles, or counts micro-batches otherwise.
    """
    rate, accumulation = _rate_of(optimizer), innermost(optimizer).gradient_accumulation_steps or 1
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
    if rate.gradient_accumulation_steps != accumulation:
        raise ScheduleError(
            f"the optimizer accumulates {accumulation} gradients for an update, its schedule was built for "
            f"{rate.gradient_accumulation_steps}: pass SnapshotSchedule(…, gradient_accumulation_steps={accumulation})"
        )
    return rate


def _rate_of(optimizer: Any) -> Any:
    # What the public `learning_rate` gives is a number, and to describe a schedule Keras imports TensorFlow.
    return innermost(optimizer)._learning_rate
