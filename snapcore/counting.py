"""When to look at an optimizer's own count: only where something may be due, so that no update waits for it."""

from snapcore.protocol import Cursor


class Calls:
    """Count a loop's calls, each of which follows some updates, and tell when the updates themselves must be counted.

    Reading an optimizer's count waits for the update that is being done. As long as the calls cannot have led to the
    next boundary, there is nothing to read it for. A call that turns out to have done more than was known is
    remembered.

    Arguments:
        cursor: where the run is.
        every: lengths at whose multiples something else is due, such as resume points; None for none.
        per_call: updates in a call, at most, as far as is known.

    Example:
        >>> from snapcore import CosineCycles, Cursor
        >>> calls = Calls(Cursor(CosineCycles(lr=0.1, steps=60, cycles=3)))
        >>> calls.next_may_be_due()     # the first call: nothing is known of it
        True
        >>> calls.add()
        >>> calls.settle(1)
        >>> calls.next_may_be_due()
        False
    """

    def __init__(self, cursor: Cursor, every: tuple[int | None, ...] = (), per_call: int = 1) -> None:
        self._cursor = cursor
        self._lengths = [length for length in every if length]
        self._per_call = per_call
        self._reach = 0
        self.waiting = 0
        """Calls since the cursor was moved."""

    def next_may_be_due(self) -> bool:
        """Return whether the updates must be counted after one more call, since something may be due then."""
        return (self.waiting + 1) * self._per_call >= self._reach

    def add(self) -> None:
        """Count a call."""
        self.waiting += 1

    @property
    def most(self) -> int:
        """How many updates the calls since have done, at most, as far as is known."""
        return self.waiting * self._per_call

    def settle(self, updates: int) -> None:
        """Begin anew, the cursor having moved.

        Arguments:
            updates: what the calls since have done.
        """
        if self.waiting:
            self._per_call = max(self._per_call, -(-updates // self.waiting))
        self.waiting = 0
        step = self._cursor.step
        self._reach = min([self._cursor.until_next, *(length - step % length for length in self._lengths)])
