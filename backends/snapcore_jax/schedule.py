"""A schedule's rate as optax takes it: a function of the count, for Python integers and for traced ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from snapcore import Schedule, ScheduleError

Rate = Callable[[Any], Any]


class _Lax:
    """The operations of `Schedule.bind`, each of them one primitive: no nested function, no promotion on the way."""

    cos = staticmethod(lax.cos)
    mod = staticmethod(lax.rem)  # of integers; where one is negative, the value is not used

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        return lax.select(condition, _filled(condition, yes), _filled(condition, no))

    @staticmethod
    def minimum(one: Any, other: Any) -> Any:
        return lax.min(one, other)

    @staticmethod
    def real(value: Any) -> Any:
        return lax.convert_element_type(value, jnp.result_type(float))


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
        what is traced cannot raise.

    Raises:
        ScheduleError: the function was called with a negative integer, or with what is no integer.

    Example:
        >>> import jax, optax
        >>> from snapcore import CosineCycles
        >>> rate = snapshot_schedule(CosineCycles(lr=0.2, steps=300, cycles=6))
        >>> rate(25), float(jax.jit(rate)(50))
        (0.1, 0.20000000298023224)
        >>> optimizer = optax.sgd(rate, momentum=0.9, nesterov=True)

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, equation 2.
    """
    bound = cycles.bind(_Lax())

    def rate(step: Any) -> Any:
        return bound(_counts(step)) if isinstance(step, jax.Array | np.ndarray) else cycles(step)

    return rate


def _counts(step: Any) -> Any:
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise ScheduleError(f"step must be an integer, the count of updates done; got an array of {step.dtype}")
    # The formula needs a sign and room for `steps`, which counts of other widths lack.
    return step if step.dtype in (jnp.int32, jnp.int64) else lax.convert_element_type(step, jnp.int32)


def _filled(condition: Any, value: Any) -> Any:
    if isinstance(value, jax.Array):
        return value
    return np.full(np.shape(condition), value, jnp.result_type(float))
