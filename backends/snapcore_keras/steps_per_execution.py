"""Whether snapshots fall on the ends of Keras' executions: nothing can be taken within one."""

import math

from snapcore import ProtocolError, Schedule, ScheduleError


def check_cycles(schedule: Schedule, per_execution: int, accumulation: int) -> None:
    """Refuse cycles that are no whole number of executions.

    Arguments:
        schedule: says when snapshots are due.
        per_execution: batches in an execution, the model's `steps_per_execution`.
        accumulation: batches in an update, the optimizer's `gradient_accumulation_steps`.

    Raises:
        ScheduleError: naming the nearest length that works.

    Example:
        >>> from snapcore import CosineCycles
        >>> check_cycles(CosineCycles(lr=0.1, steps=300, cycles=6), 7, 1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        snapcore.errors.ScheduleError: a cycle of 50 updates is no whole number of executions of 7 batches: ...
    """
    unit = per_execution // math.gcd(per_execution, accumulation)
    due = schedule.snapshot_steps
    if all(step % unit == 0 for step in due):
        return
    length, warmup = max(schedule.cycle_lengths), schedule.cycle_starts[0]
    begin = _nearest(warmup, unit)[0] if warmup else 0
    steps = " or ".join(str(begin + len(due) * each) for each in _nearest(length, unit))
    raise ScheduleError(
        f"a cycle of {length} updates{f' after a warm-up of {warmup}' if warmup else ''} is no whole number of "
        f"executions of {per_execution} batches{f', {accumulation} to an update' if accumulation > 1 else ''}: "
        f"pass {f'warmup_steps={begin} and ' if begin != warmup else ''}steps={steps}, or "
        f"steps_per_execution={math.gcd(per_execution, *(step * accumulation for step in due))}"
    )


def check_epochs(due: tuple[int, ...], per_execution: int, batches: int | None) -> None:
    """Refuse epochs whose last, shorter execution moves the others off the snapshots.

    Arguments:
        due: batches until each snapshot, from the beginning of an epoch.
        per_execution: batches in an execution.
        batches: in an epoch; None if that is not known, which is trusted.

    Raises:
        ProtocolError: a snapshot would be late.
    """
    if not batches:
        return
    late = next((each for each in due if each % batches % per_execution), None)
    if late is not None:
        raise ProtocolError(
            f"a snapshot is due {late} batches from here, within an execution of {per_execution} batches, since an "
            f"epoch has {batches}: give every epoch a multiple of {per_execution} batches, or pass "
            f"steps_per_execution={math.gcd(per_execution, batches, *due)}"
        )


def _nearest(length: int, unit: int) -> list[int]:
    """Return the multiple of `unit` that is nearest to a length, or the two that are."""
    below = length - length % unit
    found = {each for each in (below, below + unit) if each > 0}
    distance = min(abs(each - length) for each in found)
    return sorted(each for each in found if abs(each - length) == distance)
