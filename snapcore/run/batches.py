"""The position in a loader, epoch after epoch, kept so that it can be found again."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Self, TypeVar

from snapcore.errors import ProtocolError
from snapcore.protocol import Cursor

Batch = TypeVar("Batch")

_INNER = ("sampler", "batch_sampler", "dataset", "base_dataloader", "dataloader", "loader", "_loader")
_MOST_PARTS = 20
_END: Any = object()
_MOST_MICRO_BATCHES = 1000
"""Batches, all of them recorded, without an update: an update may take several epochs of a small data set."""


class EpochBatches(Generic[Batch]):
    """The batches of an epoch that come next, each once.

    Attributes:
        start: the number in its epoch of the first of them; 0 but after a resume. A loop that numbers its batches
            goes on with `enumerate(batches, batches.start)`.
    """

    def __init__(self, batches: Iterator[Batch], start: int) -> None:
        self._batches, self.start = batches, start

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)


class Epochs:
    """Walk a loader until a cursor stops.

    The order of an epoch is drawn when it begins, from the random states of that moment. They are part of the position:
    resuming draws the same order again, skips the batches that were used, and sets the random states of the moment
    again. A batch is used once an update was made of it: one that was taken and left is given again.

    Arguments:
        cursor: says when to stop.
        random_state: gives all random states as plain JSON.
        set_random_state: takes them back.
        on_ask: called when the loop has used all its batches and asks for the next, before that is drawn: what it did
            after its last update, such as an evaluation, is done by then.
    """

    def __init__(
        self,
        cursor: Cursor,
        random_state: Callable[[], Any],
        set_random_state: Callable[[Any], None],
        on_ask: Callable[[], None] = lambda: None,
    ) -> None:
        self._cursor, self._on_ask = cursor, on_ask
        self._random_state, self._set_random_state = random_state, set_random_state
        self._position: dict[str, Any] = {"epoch": 0, "batches": 0, "random": None}  # after the last batch used
        self._epoch, self._random, self._given = 0, None, 0  # where the loop is
        self._micro = self.settled = False  # settled: whether an update was done since this was last set to False
        self._asked: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON: that after the last batch used."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position; the next `walk` begins there."""
        self._position = dict(state)
        self._epoch, self._random, self._given = state["epoch"], state["random"], state["batches"]

    def settle(self) -> None:
        """Count the batches given so far as used; called at every update."""
        position = self._position
        position["epoch"], position["batches"], position["random"] = self._epoch, self._given, self._random
        self._asked = None
        self.settled = True

    @property
    def random_when_asked(self) -> Any:
        """The random states with which a batch was asked for that no update was made of yet; None if there is none.

        They are kept only in loops of several batches for an update, which draw in between.
        """
        return self._asked if self._unused else None

    def walk(self, loader: Iterable[Batch], *, stateful: bool = False) -> Iterator[Batch]:
        """Yield the batches of `loader`, epoch after epoch, until the cursor stops. See `epochs`."""
        for _, batches in self.epochs(loader, stateful=stateful):
            yield from batches

    def epochs(self, loader: Iterable[Batch], *, stateful: bool = False) -> Iterator[tuple[int, EpochBatches[Batch]]]:
        """Yield each epoch's number, from 0, and its batches, until the cursor stops.

        After a resume the first is the epoch that was under way, with the batches that are left of it. If the run was
        stopped after its last update, none is left, and what a loop does at the end of an epoch is done then.

        Arguments:
            loader: may be walked again every epoch. `set_epoch` is called where there is one: on the loader, its
                sampler, batch sampler or data set, and on those of a loader that it wraps.
            stateful: whether the loader's own state says where it is, so that nothing is skipped.

        Raises:
            ProtocolError: the loader is empty, or a whole epoch passed without a batch being recorded.
        """
        self.load_state_dict(self._position)  # what an earlier walk has given and nobody used is given again
        idle = 0
        while not self._cursor.finished:
            before, first = self._cursor.step, self._given
            yield self._epoch, EpochBatches(self._batches(loader, stateful), first)
            if self._cursor.finished:
                return
            if self._given == 0:
                raise ProtocolError("the loader gave no batch: it must be one that can be walked again every epoch")
            idle = idle + self._given if self._cursor.step == before else 0
            if idle and first == 0 and (self._unused or idle > _MOST_MICRO_BATCHES):
                raise ProtocolError(f"no update in {idle} batches: call run.step() after every optimizer step")
            all_used = not self._unused
            self._epoch, self._random, self._given = self._epoch + 1, None, 0
            if all_used:  # else those that are left are given again, and then the next epoch
                self._position = {"epoch": self._epoch, "batches": 0, "random": None}

    @property
    def _unused(self) -> bool:
        return (self._position["epoch"], self._position["batches"]) != (self._epoch, self._given)

    def _batches(self, loader: Iterable[Batch], stateful: bool) -> Iterator[Batch]:
        self._ask()
        batches = self._begin(loader, stateful)
        while (batch := next(batches, _END)) is not _END:
            self._given += 1
            try:
                yield batch
            except GeneratorExit:  # the loop breaks, and is as it would be when it asks for the next
                self._ask()
                raise
            if self._cursor.finished:
                return
            self._ask()

    def _ask(self) -> None:
        if self._unused:  # a micro-batch was given, and what it drew is drawn again by a resumed run
            self._micro = True
            return
        self._on_ask()
        if self._micro and self._asked is None:
            self._asked = self._random_state()

    def _begin(self, loader: Iterable[Batch], stateful: bool) -> Iterator[Batch]:
        for each in with_epochs(loader):
            each.set_epoch(self._epoch)
        now, begin = self._random_state(), self._random
        if begin is None:
            self._random = now
            if not self._unused:
                self._position["random"] = now
            return iter(loader)
        if not stateful:
            self._set_random_state(begin)
        batches = iter(loader)
        if self._given:  # at the very first one there is no later moment than this
            if not stateful:
                for _ in range(self._given):
                    next(batches, None)
            self._set_random_state(now)
        return batches


def with_epochs(loader: object) -> list[Any]:
    """Return what is given the number of an epoch before it begins: a loader and its parts that have `set_epoch`."""
    return [each for each in parts(loader) if callable(getattr(each, "set_epoch", None))]


def parts(loader: object) -> list[Any]:
    """Return a loader, the loaders that it wraps, and their samplers and data sets, each once."""
    found = [loader]
    for each in found:  # which grows
        for name in _INNER:
            inner = getattr(each, name, None)
            if inner is not None and len(found) < _MOST_PARTS and not any(inner is known for known in found):
                found.append(inner)
    return found
