"""A run inside somebody else's trainer, which owns the loop, its length and the checkpoints.

The trainer's checkpoint holds the weights and a `Position`; the run directory holds the members. Whatever checkpoint
the trainer resumes from, the position in it says which members belong to it.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snapcore.errors import CycleWarning, ProtocolError
from snapcore.protocol import Program


@dataclass(frozen=True)
class Position:
    """A position in a run, to keep in a trainer's own checkpoint.

    Arguments:
        step: updates done.
        members: the SHA-256 of each member taken by then, in order.

    Example:
        >>> Position.from_dict(Position(20, ("6a…",)).to_dict())
        Position(step=20, members=('6a…',))
    """

    step: int = 0
    members: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON."""
        return {"step": self.step, "members": list(self.members)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Position":
        """Return the position that `to_dict` described.

        Raises:
            ProtocolError: it is none.
        """
        step, members = values.get("step"), values.get("members")
        plain = type(step) is int and isinstance(members, list | tuple) and all(type(each) is str for each in members)
        if values.keys() != {"step", "members"} or not plain:
            raise ProtocolError(f"a position has a step and the digests of members, got {dict(values)!r}")
        return cls(int(values["step"]), tuple(values["members"]))


def check_length(program: Program, planned: float, option: str) -> None:
    """Compare a program's length with what a trainer is going to do.

    Arguments:
        program: what is to be walked.
        planned: updates that the trainer ends after, those before a checkpoint included; infinity if it does not say.
        option: the trainer's own option for that, to name in messages.

    Raises:
        ProtocolError: the trainer would do more updates than the program has rates for.

    Warns:
        CycleWarning: the trainer ends before the last members are due.
    """
    cure = f"pass {option}={program.updates}, or make a schedule of {planned} steps"
    if program.updates < planned < float("inf"):
        raise ProtocolError(f"the trainer is to do {planned} updates, the program ends after {program.updates}: {cure}")
    if planned < program.updates:
        missed = sum(due > planned for due in program.schedule.snapshot_steps)
        warnings.warn(
            f"the trainer ends after {planned} of the program's {program.updates} updates, and {missed} of its members "
            f"will not be taken: {cure}",
            CycleWarning,
            stacklevel=3,
        )
