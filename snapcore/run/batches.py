"""The place in a loader, epoch after epoch, kept so that it can be found again."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from snapcore.errors import ProtocolError
from snapcore.protocol import Cursor

Batch = TypeVar("Batch")


class Epochs:
    """Walk a loader until a cursor stops.

    The order of an epoch is drawn when it begins, from the random states of that moment. They are part of the place:
    going on draws the same order again, passes over the batches that were used, and puts the random states of the
    moment back. A batch is used once an update was made of it: one that was taken and left is given again.

    Arguments:
        cursor: says when to stop.
        random_state: gives all random states as plain JSON.
        set_random_state: takes them back.
    """

    def __init__(
        self, cursor: Cursor, random_state: Callable[[], Any], set_random_state: Callable[[Any], None]
    ) -> None:
        self._cursor = cursor
        self._random_state, self._set_random_state = random_state, set_random_state
        self._place: dict[str, Any] = {"epoch": 0, "batches": 0, "random": None}
        self._given = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the place as plain JSON: that after the last batch used."""
        return dict(self._place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the place; the next `walk` begins there."""
        self._place = dict(state)
        self._given = self._place["batches"]

    def settle(self) -> None:
        """Count the batches given so far as used; called at every update."""
        self._place["batches"] = self._given

    def walk(self, loader: Iterable[Batch], *, places_itself: bool = False) -> Iterator[Batch]:
        """Yield the batches of `loader`, epoch after epoch, until the cursor stops.

        Arguments:
            loader: may be walked again every epoch; its sampler's `set_epoch` is called if it has one.
            places_itself: whether the loader's own state says where it is, so that nothing is passed over.

        Raises:
            ProtocolError: the loader is empty, or a whole epoch passed without an update being recorded.
        """
        while not self._cursor.finished:
            before, first = self._cursor.step, self._place["batches"]
            self._given = first
            for batch in self._epoch(loader, places_itself):
                self._given += 1
                yield batch
                if self._cursor.finished:
                    return
            if self._given == 0:
                raise ProtocolError("the loader gave no batch: it must be one that can be walked again every epoch")
            if self._cursor.step == before and first == 0:
                raise ProtocolError(f"no update in {self._given} batches: call run.step() after every optimizer step")
            self._place = {"epoch": self._place["epoch"] + 1, "batches": 0, "random": None}

    def _epoch(self, loader: Iterable[Batch], places_itself: bool) -> Iterator[Batch]:
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._place["epoch"])
        now, begin = self._random_state(), self._place["random"]
        if begin is None:
            self._place["random"] = now
        if begin is None:
            return iter(loader)
        if not places_itself:
            self._set_random_state(begin)
        batches = iter(loader)
        if self._place["batches"]:  # at the very first one there is no later moment than this
            if not places_itself:
                self._pass_over(batches)
            self._set_random_state(now)
        return batches

    def _pass_over(self, batches: Iterator[Any]) -> None:
        for _ in range(self._place["batches"]):
            next(batches, None)
