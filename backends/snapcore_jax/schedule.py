"""A schedule's rate as optax takes it: a function of the count, for Python integers and for traced ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from snapcore import Schedule, ScheduleError

Rate = Callable[[Any], Any]

ASKED: set[Schedule] = set()
"""The schedules that optax has asked for a rate in this process, when an update was traced or done.

An optimizer's state does not say which rate it is used with. But an optimizer that was built with `snapshot_schedule`
asks it; so a schedule that nobody has asked is one that no update has followed.
"""


class _Lax:
    """The operations of `Schedule.bind`, each of them one primitive: no nested function, no promotion on the way.

    Arguments:
        counts: the integer type of the steps.
    """

    cos = staticmethod(lax.cos)
    minimum = staticmethod(lax.min)

    def __init__(self, counts: Any) -> None:
        self._counts = counts

    def mod(self, step: Any, length: Any) -> Any:
        """Take the remainder of integers; of a negative one the value is not used."""
        return lax.rem(step, self._counts.type(length) if type(length) is int else length)

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        return lax.select(condition, self._filled(condition, yes), self._filled(condition, no))

    @staticmethod
    def real(value: Any) -> Any:
        """Leave integers alone: what they are multiplied with is Python's float, and that makes a weakly typed one."""
        return value

    def _filled(self, condition: Any, value: Any) -> Any:
        if isinstance(value, jax.Array):
            return value
        shape = np.shape(condition)
        return np.full(shape, value, self._counts) if type(value) is int else lax.full(shape, value)


def snapshot_schedule(cycles: Schedule) -> Rate:
    """Return the schedule as an `optax.Schedule`: a function from the count of updates done to the rate.

    Traced counts give what equation 2 gives, up to the rounding of the float type: float32, or float64 under
    `jax_enable_x64`. Cycles are found in integers. The size of what is traced does not depend on their number.

    Arguments:
        cycles: such as `snapcore.CosineCycles`. Joined after others (`optax.join_schedules`) it begins with its own
            first update.

    Returns:
        A function of a Python or NumPy integer, which gives a float, exactly `cycles(step)`; or of an integer array,
        traced or not, of any shape, which gives an array of that shape. Arrays are clamped to 0 … steps − 1, since
        what is traced cannot raise. The array is weakly typed, like those of optax's own schedules: bfloat16 weights
        times a rate are bfloat16.

    Raises:
        ScheduleError: more steps than optax counts, 2³¹ − 1; or the function was called with a negative integer, or
            with what is no integer.

    Example:
        >>> import jax, optax
        >>> from snapcore import CosineCycles
        >>> rate = snapshot_schedule(CosineCycles(lr=0.2, steps=300, cycles=6))
        >>> rate(25), float(jax.jit(rate)(50))
        (0.1, 0.20000000298023224)
        >>> optimizer = optax.sgd(rate, momentum=0.9, nesterov=True)

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, equation 2.
    """
    refuse_uncountable(cycles)
    last = cycles.steps - 1

    def rate(step: Any) -> Any:
        if not isinstance(step, jax.Array | np.ndarray):
            return cycles(step)
        counts = _counts(step)
        if not counts.shape:  # an update's count, and not a row of steps to be plotted
            ASKED.add(cycles)
        within = lax.clamp(counts.dtype.type(0), counts, counts.dtype.type(last))
        return cycles.bind(_Lax(counts.dtype), clamped=False)(within)

    return rate


def refuse_uncountable(cycles: Schedule) -> None:
    """Raise `ScheduleError` if there are more steps than optax can count."""
    most = np.iinfo(np.int32).max
    if cycles.steps > most:
        raise ScheduleError(
            f"steps must be below {most + 1:,}, since optax counts updates in int32; got {cycles.steps:,}: train in "
            "several runs"
        )


def _counts(step: Any) -> Any:
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise ScheduleError(f"step must be an integer, the count of updates done; got an array of {step.dtype}")
    # The formula needs a sign and room for `steps`, which counts of other widths lack.
    return step if step.dtype in (jnp.int32, jnp.int64) else lax.convert_element_type(step, jnp.int32)
