"""What is being trained, as the recorder sees it: the values that the loop has handed over last."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from snapcore.protocol import OptimizerState
from snapcore.store import Tensors
from snapcore_jax.counting import Optimizer, injected_settings, optimizer_name, with_new_moments
from snapcore_jax.loaders import Memory, set_torch_state, torch_state
from snapcore_jax.state import (
    Copy,
    dump_extras,
    dump_training,
    load_extras,
    load_training,
    named_leaves,
    with_parts,
)

Batch = TypeVar("Batch")

MISSING: Any = object()
"""Stands for a value that was not handed over."""


class Source:
    """Hold what the loop has handed over, and the loader that it walks.

    Arguments:
        init: gives variables for a member number.
        optimizer: gives new moments.
        extras: more objects for resume points, by name.
    """

    def __init__(
        self, init: Callable[[int], Any] | None, optimizer: Optimizer | None, extras: Mapping[str, Any] | None
    ) -> None:
        self._init, self._optimizer, self._extras = init, optimizer, dict(extras or {})
        self.variables = self.rest = MISSING
        self.resumable = True
        """Whether `rest` is handed over too."""
        self._memory: Memory | None = None
        self._resumed: dict[str, Any] | None = None
        self._drawn: list[int] = []

    @property
    def rest_or_nothing(self) -> Any:
        """`rest`, or an empty tree where it is not handed over."""
        return self.rest if self.resumable else ()

    @property
    def parts(self) -> dict[str, Any]:
        """What is held, by its name in messages."""
        return parts_of(self.variables, self.rest)

    def hand_back(self) -> Any:
        """Return what is held as the loop takes it."""
        return (self.variables, self.rest) if self.resumable else self.variables

    def let_go(self) -> None:
        """Hold nothing: nothing more is copied, and the memory is the loop's."""
        self.variables = self.rest = MISSING

    def is_stateful(self, loader: object) -> bool:
        """Return whether the loader's own position is in resume points."""
        return any(loader is each for each in self._extras.values())

    def use(self, loader: Iterable[Batch], epoch: int) -> Iterable[Batch]:
        """Take in the loader about to be walked, from that epoch; after a resume as it was."""
        if self._memory is None or self._memory.loader is not loader:
            self._memory = Memory(loader, resumable=self.resumable)
        if self._resumed is not None and self._resumed["loader"] is not None:
            self._memory.set_state(self._resumed["loader"])
            self._memory.draw_again(self._drawn, epoch)
        self._resumed = None
        return self._memory.walked(loader)

    @property
    def fresh(self) -> Callable[[int], Copy] | None:
        """Give new weights for a member number; None without `init`."""
        init = self._init
        return None if init is None else lambda member: Copy(named_leaves(init(member), random=False))

    def capture(self) -> Copy:
        """Return a copy of the variables, random keys left out."""
        return Copy(named_leaves(self.variables, random=False))

    def restore(self, tensors: Tensors | None, *, optimizer: OptimizerState) -> None:
        """Hold these weights instead, the optimizer's moments kept or reset."""
        if tensors is not None:
            parts = self.variables, self.rest_or_nothing
            self.variables, rest = with_parts(parts, (tensors, None), "a restart's member", random=False)
            self.rest = rest if self.resumable else MISSING
        if optimizer == "reset":
            self.rest = with_new_moments(self._optimizer, self.variables, self.rest)

    def dump(self) -> tuple[Copy, dict[str, Any]] | None:
        """Return a copy of all that a resume needs; None without `rest`."""
        if not self.resumable:
            return None
        drawn = [] if self._memory is None else self._memory.drawn
        return dump_training(self.variables, self.rest), {"state": dump_extras(self._extras), "drawn": drawn}

    def load(self, tensors: Tensors, values: dict[str, Any]) -> None:
        """Hold what `dump` returned."""
        self.variables, self.rest = load_training(self.variables, self.rest_or_nothing, tensors)
        load_extras(self._extras, values["state"])
        self._drawn = values["drawn"]

    def settings(self) -> dict[str, str | float | bool | None]:
        """Return the optimizer's name and the settings that `optax.inject_hyperparams` keeps."""
        rest = self.rest_or_nothing
        name = optimizer_name(rest)
        return {**injected_settings(rest), **({"optimizer": name} if name else {})}

    def random_state(self) -> dict[str, Any]:
        """Return the states that loaders draw from; JAX's own keys are among the arrays."""
        return {"torch": torch_state(), "loader": None if self._memory is None else self._memory.state()}

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Set them to what `random_state` returned."""
        set_torch_state(state["torch"])
        if self._memory is None:
            self._resumed = state  # the loader is not known yet
        elif state["loader"] is not None:
            self._memory.set_state(state["loader"])


def parts_of(variables: Any, rest: Any) -> dict[str, Any]:
    """Return what was handed over, by its name in messages."""
    return {name: part for name, part in (("variables", variables), ("rest", rest)) if part is not MISSING}
