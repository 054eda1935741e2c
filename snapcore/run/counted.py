"""A run whose updates are counted by the optimizer, on its device, and not by Python one by one.

Reading such a count waits for the update that is being done. So a loop's calls are counted instead, for nothing, and
the optimizer's own count is read where the calls since can have led to something that is due: the end of a cycle, a
resume point, or the end of the run.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from snapcore.errors import ProtocolError
from snapcore.protocol import Event
from snapcore.run.batches import EpochBatches
from snapcore.run.recorder import Recorder

Batch = TypeVar("Batch")


class CountedRun:
    """Follow an optimizer's own count: read it when something may be due, and at the end.

    Arguments:
        recorder: the run.
        read_count: the optimizer's count of its updates, or None if it keeps none and calls are updates. Reading it may
            wait for the device.
        per_call: at most so many micro-batches in a call; None if nothing is known, and then the first call is looked
            at. A call that turns out to have done more is remembered.
        accumulation: micro-batches in an update.
        unfinished: how many micro-batches of the next update are done already.
        hands_back: whether a restart gives the loop its values back when it calls, so that what is due at the end of an
            epoch is left to the call.
        check: called with the updates done and the calls that can account for them before they are recorded, to refuse
            what cannot be right.
        used_rate: called with the updates done before the last one, to give the rate it was done at and who sets that
            rate; None if it is not known.
    """

    def __init__(
        self,
        recorder: Recorder,
        read_count: Callable[[], int | None],
        *,
        per_call: int | None = None,
        accumulation: int = 1,
        unfinished: Callable[[], int] = lambda: 0,
        hands_back: bool = False,
        check: Callable[[int, int], None] | None = None,
        used_rate: Callable[[int], tuple[float, str] | None] = lambda _: None,
    ) -> None:
        self.recorder, self.cursor = recorder, recorder.cursor
        self._read_count, self._check, self._used_rate = read_count, check, used_rate
        self._accumulation, self._unfinished, self._hands_back = accumulation, unfinished, hands_back
        self._closed = False
        self.begun_at: int | None = None
        """What the optimizer had counted when this run had done no update; None while it is not known."""
        self.waiting = 0
        """Calls since the cursor was moved."""
        self._per_call, self._reach = per_call or 1, 0
        if per_call is not None:
            self._settle(0)

    @property
    def ended(self) -> bool:
        """Whether the program has stopped or the run is closed: an update after that is none of its own."""
        return self._closed or self.cursor.finished

    @property
    def updates(self) -> int:
        """Updates done; until the run has ended this waits for the last one."""
        return self.cursor.step if self.ended else self.cursor.step + self._new()

    def may_be_due(self) -> bool:
        """Return whether something may be due after one more call."""
        return (self.waiting + 1) * self._per_call >= self._reach

    def call(self) -> bool:
        """Count a call; return whether `look` must follow, since something may be due or a SIGTERM has come."""
        due = self.may_be_due() or self.recorder.asked_to_stop
        self.waiting += 1
        return due

    def look(self, *, unseen: int = 0) -> tuple[Event, ...]:
        """Read the count, move the run there, and return what was due.

        Arguments:
            unseen: updates that may have been done without a call after them.

        Raises:
            ProtocolError: the optimizer counts fewer updates than before; or `check` refuses.
        """
        new = self._new()
        if self._check is not None:
            self._check(new, self.waiting + unseen)
        used, setter = self._rate_of_the_last(new)
        events = self.recorder.record(new, late="take", used_lr=used, setter=setter)
        self._settle(new)
        return events

    def batches(self, loader: Iterable[Batch], *, stateful: bool = False) -> Iterator[Batch]:
        """Yield the loader's batches until the program stops; the run is brought up to date after every epoch."""
        return self.recorder.batches(_UpToDate(loader, self._catch_up), stateful=stateful)

    def epochs_of(
        self, loader: Iterable[Batch], *, stateful: bool = False
    ) -> Iterator[tuple[int, EpochBatches[Batch]]]:
        """Yield (epoch, its batches) until the program stops; the run is brought up to date after every epoch."""
        return self.recorder.epochs_of(_UpToDate(loader, self._catch_up), stateful=stateful)

    def finish(self, reason: str) -> None:
        """End early, with an unfinished member if an update was done since the last one."""
        self._catch_up_at_end()
        used, setter = self._rate_of_the_last(0)
        self.recorder.finish(reason, used_lr=used, setter=setter)
        self._settle(0)  # nothing is left to reach: the next call is looked at, and an update refused

    def close(self, *, exact: bool) -> None:
        """Close the run; closing twice is closing once.

        Arguments:
            exact: whether what is trained is as the last update left it, so that the run may resume from here.

        Raises:
            StoreError, DivergedError: a member or the resume point could not be written or was refused.
            SystemExit: with code 143, after a SIGTERM that no update has answered.
        """
        if self._closed:
            return
        settled = False
        try:
            if exact and not self.recorder.failed:  # else its error is all that is left to raise
                self._catch_up_at_end()
                settled = True
            elif not self.cursor.finished:  # for the message alone: nothing is written any more
                self.cursor.advance(min(self.waiting * self._per_call, self.cursor.until_next - 1))
        finally:
            self._closed = True
            self.recorder.close(exact=settled)

    def _new(self) -> int:
        """Return how many updates were done since the cursor was moved."""
        if self.begun_at is None:
            return self.waiting
        count, before = self._read_count(), self.begun_at + self.cursor.step
        if count is None or count < before:
            raise ProtocolError(
                f"the optimizer counts {count} updates, and had counted {before} before: when its state is made anew, "
                "keep the counts in it"
            )
        return count - before

    def _rate_of_the_last(self, new: int) -> tuple[float | None, str]:
        """Return the rate of the last update, the cursor still being where it was before so many new ones."""
        step = self.cursor.step + new
        return (self._used_rate(step - 1) if step else None) or (None, "")

    def _settle(self, updates: int) -> None:
        """Begin to count calls anew, the cursor having moved by so many updates."""
        if self.waiting:
            self._per_call = max(self._per_call, -(-updates // self.waiting))
        self.waiting = 0
        step = self.cursor.step
        due = min([self.cursor.until_next, *(length - step % length for length in self.recorder.intervals)])
        self._reach = due * self._accumulation - self._unfinished()

    def _catch_up(self) -> None:
        """Bring the run up to date after an epoch."""
        if not self.waiting or self.cursor.finished:
            return
        if not self._hands_back:
            self.look(unseen=1)  # an epoch's last update may have no call after it
        elif (new := self._new()) < self.cursor.until_next:
            used, setter = self._rate_of_the_last(new)
            self.recorder.record(new, used_lr=used, setter=setter)
            self._settle(new)

    def _catch_up_at_end(self) -> None:
        if self.ended:
            return
        before, most, position = self.cursor.step, self.waiting * self._per_call, self.recorder.epochs.state_dict()
        self.look(unseen=1)
        if self.cursor.step - before <= most:  # each update has had its call: a batch taken since is given again
            self.recorder.epochs.load_state_dict(position)


class _UpToDate(Generic[Batch]):
    """A loader that has the run brought up to date whenever it has been walked through."""

    def __init__(self, loader: Iterable[Batch], catch_up: Callable[[], None]) -> None:
        self.loader, self._catch_up = loader, catch_up  # `loader`: where its `set_epoch` is looked for

    def __iter__(self) -> Iterator[Batch]:
        yield from self.loader
        self._catch_up()
