"""What counts as an update: the optimizer's own steps, without those that a loss scaler skipped."""

import operator
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from snapcore import ProtocolError
from snapcore_torch.optimizers import inside, parameters_of

_version_of = operator.attrgetter("_version")


class UpdateCount:
    """Count the real updates of an optimizer.

    PyTorch's hooks run once for every class whose `step` calls that of its base: only the outermost counts. Optimizers
    inside another count once, whether the outer `step` runs or not, as in SAM's two halves; where there are several,
    the one that has done the most. A step that a `GradScaler` skipped is none. Steps replayed from a CUDA graph run no
    Python and cannot be seen.

    Arguments:
        optimizer: counted from now on, until `remove`.
        before: called before every update.
    """

    def __init__(self, optimizer: Optimizer, *, before: Callable[[], object] = lambda: None) -> None:
        within = inside(optimizer)
        self._optimizers = [optimizer, *within]
        self._before = before
        self._depth = 0
        self.counts = True
        """Whether updates are counted: until `remove`."""
        self.skipped = False
        """Whether a step was called and its update skipped since the last `take`."""
        innermost = [each for each in self._optimizers if not inside(each)]
        self._counts = [_Count() for _ in innermost]
        self._hooks: list[Any] = []
        for each in self._optimizers:
            count = next((own for own, one in zip(self._counts, innermost, strict=True) if one is each), None)
            # Accelerate's wrapper is an Optimizer by name only, and has no hooks.
            if getattr(type(each).step, "hooked", False):
                self._hooks.append(each.register_step_pre_hook(self._enter))
                self._hooks.append(each.register_step_post_hook(partial(self._leave, count)))

    @property
    def waiting(self) -> int:
        """Updates since the last `take`."""
        return max(count.updates for count in self._counts)

    def take(self) -> int:
        """Return the updates since the last call."""
        waiting, self.skipped = 0, False
        for count in self._counts:
            waiting = count.updates if count.updates > waiting else waiting
            count.updates = 0
        return waiting

    def remove(self) -> None:
        """Count no more."""
        self.counts = False
        for hook in self._hooks:
            hook.remove()

    def _enter(self, *_: object) -> None:
        if self._depth and not self._is_running():  # a step before this one has raised
            self._depth = 0
        if self._depth == 0:
            self._before()
        self._depth += 1

    def _leave(self, own: "_Count | None", *_: object) -> None:
        self._depth -= 1
        if own is not None:
            own.stepped = True
        if self._depth:
            return
        # A fused optimizer is called even when the scaler found infinities, and skips the update itself.
        found = [getattr(each, "found_inf", None) for each in self._optimizers]
        real = not any(each is not None and each.item() for each in found)
        for count in self._counts:
            if count.stepped:
                count.updates += real
                count.stepped = False
        self.skipped |= not real

    def _is_running(self) -> bool:
        """Return whether the hook was called by a step inside a step: some frame further out is another's wrapper."""
        frame = sys._getframe(2)
        wrapper = frame.f_code
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code is wrapper and any(frame.f_locals.get("self") is each for each in self._optimizers):
                return True
        return False


class _Count:
    updates = 0
    stepped = False  # inside the outermost step that is running


class ParameterWatch:
    """Notice that parameters changed and no update was seen: a rate that nobody moves would go unnoticed otherwise.

    Calls between two updates are right where gradients are accumulated, so what is looked at is whether the optimizer's
    parameters have changed. PyTorch counts writes to a tensor, which costs nothing to read; those through `.data` and
    those of a CUDA graph it does not count, so the values are compared too, as long as more calls have passed without
    an update than ever before.

    Arguments:
        model: an embedding in it that normalises its own rows is not watched.
        optimizer: whose parameters are watched.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._renormed = {id(part.weight) for part in model.modules() if getattr(part, "max_norm", None) is not None}
        self._calls = self._most_calls = 0
        self._parameters: list[torch.Tensor] = []
        self._take_in()
        self.settle()
        self._norms: list[str] | None = self._measure()

    def settle(self) -> None:
        """Take the parameters as they are for those after the last update."""
        if self._calls:
            self._most_calls, self._calls = max(self._calls, self._most_calls), 0
        self._versions, self._norms = sum(map(_version_of, self._parameters)), None

    def check(self, *, excuse: Callable[[], bool] = lambda: False) -> None:
        """Take note of a call without an update.

        Arguments:
            excuse: asked where parameters changed; True if that is right, as after an update that a scaler skipped.

        Raises:
            ProtocolError: there was one all the same.
        """
        if self._take_in():  # what they were before is not known
            self.settle()
        self._calls += 1
        changed = sum(map(_version_of, self._parameters)) != self._versions
        if not changed and self._calls > self._most_calls:
            norms = self._measure()
            changed = self._norms is not None and norms != self._norms
            self._norms = norms
        if changed and excuse():
            self.settle()
        elif changed:
            raise ProtocolError(
                f"the parameters were updated, but not by step() of the {type(self._optimizer).__name__} that this run "
                "was given: give it the one that steps, or call run.step(updates=1) after each"
            )

    def _take_in(self) -> bool:
        """Make the list of parameters, which `settle` reads at every update; return whether there were others."""
        before = self._parameters
        self._parameters = [each for each in parameters_of(self._optimizer) if id(each) not in self._renormed]
        return len(before) != len(self._parameters) or any(map(operator.is_not, before, self._parameters))

    def _measure(self) -> list[str]:
        # As text, in which a NaN equals itself.
        return [
            float(torch.linalg.vector_norm(each.detach().flatten().float())).hex()
            for each in self._parameters
            if not each.is_complex()
        ]
