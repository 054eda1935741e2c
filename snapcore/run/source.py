"""What is being trained, as a run sees it."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from snapcore.backend import Pending
from snapcore.errors import ProtocolError
from snapcore.protocol import OptimizerState, Program
from snapcore.store import Tensors


class Source(Protocol):
    """What is being trained: a managed loop's state, or a loop of the user's own."""

    @property
    def fresh(self) -> Callable[[int], Pending | Tensors] | None:
        """Give new weights for a member number, named as `capture` names them; None if there is no way to."""
        ...

    def capture(self) -> Pending | Tensors:
        """Return a copy of the weights that later updates cannot change."""
        ...

    def restore(self, tensors: Tensors | None, *, optimizer: OptimizerState) -> None:
        """Continue from these weights (None: from those that are there), the optimizer's moments kept or reset."""
        ...

    def dump(self) -> tuple[Pending | Tensors, dict[str, Any]] | None:
        """Return a copy of all that training needs to resume, as tensors and plain JSON; None if it cannot be resumed.

        The weights of `capture` are in it, their names after `weights/`.
        """
        ...

    def load(self, tensors: Tensors, values: dict[str, Any]) -> None:
        """Resume from what `dump` returned."""
        ...

    def settings(self) -> Mapping[str, str | float | bool | None]:
        """Return the settings in force, for a resume to compare: `optimizer` (its class), momentum and the like."""
        ...

    def random_state(self) -> Any:
        """Return the framework's own random states as plain JSON."""
        ...

    def set_random_state(self, state: Any) -> None:
        """Set them to what `random_state` returned."""
        ...


def require_fresh(program: Program, fresh: object | None) -> None:
    """Refuse a program that needs fresh weights where nothing gives them.

    Raises:
        ProtocolError: `fresh` is None, and the program restarts from fresh weights.
    """
    if program.between.source == "fresh" and fresh is None:
        raise ProtocolError(
            f"{program.method} starts members from fresh weights: pass init=, a function from a member's number to "
            "new weights"
        )
