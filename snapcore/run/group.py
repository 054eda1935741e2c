"""The processes that train one model together; most often it is one, alone."""

from typing import Any, Protocol


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
