"""When to look at an optimizer's own count: only where something may be due, so that no update waits for it.

And at the end, whether anything is due there or not.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from snapcore.protocol import Cursor
from snapcore.run.recorder import Recorder


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


class Ending:
    """End a run whose updates an optimizer counts: where the loop is by then, and once.

    Arguments:
        recorder: the run.
        calls: those of its loop.
        look: moves the run to where the optimizer's count is, and settles the calls.
    """

    def __init__(self, recorder: Recorder, calls: Calls, look: Callable[[], object]) -> None:
        self._recorder, self._cursor, self._calls, self._look = recorder, recorder.cursor, calls, look
        self._closed = False

    @property
    def reached(self) -> bool:
        """Whether the program has stopped or the run is closed: an update after that is none of its own."""
        return self._closed or self._cursor.finished

    def finish(self, reason: str) -> None:
        """End early, with an unfinished member if an update was done since the last one."""
        self._settle()
        self._recorder.finish(reason)
        self._calls.settle(0)  # nothing is left to reach: the next call is looked at, and an update refused

    def close(self, *, exact: bool) -> None:
        """Close the run; closing twice is closing once.

        Arguments:
            exact: whether what is trained is as the last update left it, so that the run may go on from here.

        Raises:
            StoreError, DivergedError: a member or the resume point could not be written or was refused.
            SystemExit: with code 143, after a SIGTERM that no update has answered.
        """
        if self._closed:
            return
        settled = False
        try:
            if exact and not self._recorder.failed:  # else its error is all that is left to tell
                self._settle()
                settled = True
            elif not self._cursor.finished:  # for the message alone: nothing is written any more
                self._cursor.advance(min(self._calls.most, self._cursor.until_next - 1))
        finally:
            self._closed = True
            self._recorder.close(exact=settled)

    def _settle(self) -> None:
        if self.reached:
            return
        before, most, place = self._cursor.step, self._calls.most, self._recorder.epochs.state_dict()
        self._look()
        if self._cursor.step - before <= most:  # each update has had its call: a batch taken since is given again
            self._recorder.epochs.load_state_dict(place)


class FollowedLoader:
    """A loader that has the run brought up to date whenever it has been walked through.

    Arguments:
        loader: may be walked again every epoch.
        catch_up: called at the end of every epoch.
    """

    def __init__(self, loader: Iterable[Any], catch_up: Callable[[], object]) -> None:
        self._loader, self._catch_up = loader, catch_up
        self.sampler = getattr(loader, "sampler", None)
        """The loader's own, whose `set_epoch` is called if it has one."""

    def __iter__(self) -> Iterator[Any]:
        yield from self._loader
        self._catch_up()
