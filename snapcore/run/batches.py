"""The position in a loader, epoch after epoch, kept so that it can be found again."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from snapcore.errors import ProtocolError
from snapcore.protocol import Cursor

Batch = TypeVar("Batch")


class Epochs:
    """Walk a loader until a cursor stops.

    The order of an epoch is drawn when it begins, from the random states of that moment. They are part of the position:
    resuming draws the same order again, skips the batches that were used, and sets the random states of the moment
    again. A batch is used once an update was made of it: one that was taken and left is given again.

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
        self._position: dict[str, Any] = {"epoch": 0, "batches": 0, "random": None}
        self._given = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON: that after the last batch used."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position; the next `walk` begins there."""
        self._position = dict(state)
        self._given = self._position["batches"]

    def settle(self) -> None:
        """Count the batches given so far as used; called at every update."""
        self._position["batches"] = self._given

    def walk(self, loader: Iterable[Batch], *, stateful: bool = False) -> Iterator[Batch]:
        """Yield the batches of `loader`, epoch after epoch, until the cursor stops.

        Arguments:
            loader: may be walked again every epoch; its sampler's `set_epoch` is called if it has one.
            stateful: whether the loader's own state says where it is, so that nothing is skipped.

        Raises:
            ProtocolError: the loader is empty, or a whole epoch passed without an update being recorded.
        """
        while not self._cursor.finished:
            before, first = self._cursor.step, self._position["batches"]
            self._given = first
            for batch in self._epoch(loader, stateful):
                self._given += 1
                yield batch
                if self._cursor.finished:
                    return
            if self._given == 0:
                raise ProtocolError("the loader gave no batch: it must be one that can be walked again every epoch")
            if self._cursor.step == before and first == 0:
                raise ProtocolError(f"no update in {self._given} batches: call run.step() after every optimizer step")
            self._position = {"epoch": self._position["epoch"] + 1, "batches": 0, "random": None}

    def _epoch(self, loader: Iterable[Batch], stateful: bool) -> Iterator[Batch]:
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._position["epoch"])
        now, begin = self._random_state(), self._position["random"]
        if begin is None:
            self._position["random"] = now
        if begin is None:
            return iter(loader)
        if not stateful:
            self._set_random_state(begin)
        batches = iter(loader)
        if self._position["batches"]:  # at the very first one there is no later moment than this
            if not stateful:
                self._pass_over(batches)
            self._set_random_state(now)
        return batches

    def _pass_over(self, batches: Iterator[Any]) -> None:
        for _ in range(self._position["batches"]):
            next(batches, None)
