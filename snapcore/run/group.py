"""The processes that train one model together; most often it is one, alone."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from snapcore.errors import SnapcoreError, StoreError

Result = TypeVar("Result")


class Group(Protocol):
    """What a run asks of the processes it is spread over; all of them call each verb at the same update."""

    @property
    def rank(self) -> int:
        """The number of this process; process 0 writes."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank. No process returns before all have called it."""
        ...


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]


def in_first(group: Group, action: Callable[[], Result]) -> Result | None:
    """Do something in process 0; what is refused there is refused in every process, so that none waits for ever.

    Returns:
        What it returns there, and None in every other process.
    """
    result: Result | None = None
    refusal: SnapcoreError | None = None
    if group.rank == 0:
        try:
            result = action()
        except SnapcoreError as error:
            refusal = error
    message = group.gather(None if refusal is None else str(refusal))[0]
    if refusal is not None:
        raise refusal
    if message is not None:
        raise StoreError(message)
    return result
