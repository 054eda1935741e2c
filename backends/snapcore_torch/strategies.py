"""The ways to run all members on one batch: one after the other, or stacked into one vectorised call."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from snapcore import DataError
from snapcore.ensemble import reason
from snapcore_torch.state import unwrapped

STRATEGIES = ("loop", "stacked", "graph")

_INSTEAD = "use strategy='loop'"


class Stacked:
    """Run all members in one call, their tensors stacked along a first axis of members.

    Tied weights are stacked once, and used under each of their names. What a module refers to from outside its
    parameters and buffers is the first member's, so the first batch should be compared with the loop.

    Arguments:
        members: modules of one class, with the same names, shapes and dtypes.

    Raises:
        DataError: the members differ in more than values, or hold a recurrent layer, which `torch.vmap` cannot run.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        models = [unwrapped(member) for member in members]
        tensors = [
            dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
            for model in models
        ]  # buffers outside the state too, and every name of a tied tensor
        _check_alike(models, tensors)
        for name, module in models[0].named_modules():
            if isinstance(module, nn.RNNBase):
                raise DataError(
                    f"{name or 'the model'!r} is {type(module).__name__}, for which torch.vmap has no rule: {_INSTEAD}"
                )
        stacks: dict[tuple[int, ...], Tensor] = {}
        self._base = models[0]
        self._tensors = {}
        for name in tensors[0]:
            same = [each[name] for each in tensors]
            tied = tuple(map(id, same))
            if tied not in stacks:
                stacks[tied] = torch.stack([tensor.detach() for tensor in same])
            self._tensors[name] = stacks[tied]

    def __call__(self, each: Callable[[Any], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return `each(outputs)` of every member, the member axis first.

        Raises:
            DataError: under autocast, which `torch.vmap` leaves out in part without saying so; or the model does
                something that cannot be vectorised. What one member alone fails at too is raised as it is.
        """
        for device in {tensor.device.type for tensor in self._tensors.values()}:
            if torch.is_autocast_enabled(device):
                raise DataError(
                    f"stacked members would leave autocast out in part: {_INSTEAD}, or convert the model itself, "
                    "such as model.bfloat16()"
                )

        def member(tensors: dict[str, Tensor]) -> Tensor:
            return each(functional_call(self._base, tensors, args, kwargs, tie_weights=False, strict=True))

        try:
            return torch.vmap(member)(self._tensors)
        except (RuntimeError, ValueError) as error:
            failed = error
        # Where one alone fails too, stacking is not why.
        member({name: stack[0].clone() for name, stack in self._tensors.items()})
        raise DataError(f"{type(self._base).__name__} cannot be run stacked: {reason(failed)}; {_INSTEAD}") from failed


def _check_alike(models: Sequence[nn.Module], tensors: Sequence[dict[str, Tensor]]) -> None:
    kinds = [{name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in each.items()} for each in tensors]
    for number, (model, kind) in enumerate(zip(models, kinds, strict=True), 1):
        if type(model) is not type(models[0]):
            found = f"{type(model).__name__}, the first {type(models[0]).__name__}"
            raise DataError(f"stacked members must be of one class, but member {number} is {found}: {_INSTEAD}")
        for name in kinds[0].keys() | kind.keys():
            if kind.get(name) != kinds[0].get(name):
                raise DataError(
                    f"stacked members must have the same tensors, but {name!r} of member {number} is "
                    f"{_described(kind.get(name))}, the first's is {_described(kinds[0].get(name))}: {_INSTEAD}"
                )


def _described(kind: tuple[torch.Size, torch.dtype, torch.device] | None) -> str:
    return "missing" if kind is None else f"{tuple(kind[0])} {kind[1]} on {kind[2]}"
