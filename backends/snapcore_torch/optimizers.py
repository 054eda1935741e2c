"""An optimizer as a whole: with those inside it, checked against the model that it is to train, saved and loaded."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snapcore import DataError, ProtocolError


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of every group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def inside(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that one holds and that train the same parameters, at any depth, outer ones first.

    Accelerate's wrapper, SAM and Lookahead hold one that does the updates; some hold several, each for a part.
    """
    own = {id(parameter) for parameter in parameters_of(optimizer)}
    found: list[Optimizer] = []
    for value in vars(optimizer).values():
        several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for each in several:
            if isinstance(each, Optimizer) and any(id(parameter) in own for parameter in parameters_of(each)):
                found += [each, *inside(each)]
    return found


def check_optimizer(optimizer: Any, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse an optimizer that cannot be counted, saved, or that trains something else than the model.

    Arguments:
        optimizer: as the user gave it.
        model: what it is to train.
        state: the other objects that resume points hold; modules among them may be trained too.

    Raises:
        ProtocolError: it is not one, shards its state, has groups of its own inside, or trains what is not given.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
            raise ProtocolError(f"one torch.optim.Optimizer is counted, got {kind}, a wrapper: pass its .optimizer")
        raise ProtocolError(
            f"one torch.optim.Optimizer is counted, got {kind}: make one optimizer with a parameter group for each, or "
            "give the others to a scheduler of their own and to state="
        )
    if hasattr(optimizer, "consolidate_state_dict"):
        raise ProtocolError(
            f"{kind} shards its state over the processes, and a resume point holds all of it: use the optimizer that "
            "it wraps"
        )
    groups = {id(group) for group in optimizer.param_groups}
    for each in inside(optimizer):
        if any(id(group) not in groups for group in each.param_groups):
            raise ProtocolError(
                f"{kind} holds a {type(each).__name__} with parameter groups of its own, whose rate nobody would set: "
                "pass that one, and the outer one in state="
            )
    own = {id(parameter) for parameter in model.parameters()}
    trained = list(parameters_of(optimizer))
    if not any(id(parameter) in own for parameter in trained):
        raise ProtocolError(
            f"the optimizer ({kind}) trains none of the model's parameters: build it from this model's parameters(), "
            "after the model is built"
        )
    for each in state.values():
        if isinstance(each, nn.Module):
            own |= {id(parameter) for parameter in each.parameters()}
    others = [tuple(parameter.shape) for parameter in trained if id(parameter) not in own]
    if others:
        raise ProtocolError(
            f"the optimizer trains {len(others)} parameters that are not the model's, such as one of shape "
            f'{others[0]}: give their module in state={{"head": head}}, or build the optimizer from this model'
        )


def settings_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's class, and the settings of its first group that are numbers (but not the rate) or flags."""
    parts = inside(optimizer)
    kind = parts[0] if parts and parts[0].state is optimizer.state else optimizer  # Accelerate's wrapper says nothing
    group = optimizer.param_groups[0]
    names = [name for name in optimizer.defaults if name != "lr" and name in group]
    plain = {name: str(group[name]) if isinstance(group[name], tuple) else group[name] for name in names}
    return {"optimizer": type(kind).__name__} | {
        name: value
        for name, value in plain.items()
        if isinstance(value, str | float | bool) and not (isinstance(value, float) and math.isnan(value))
    }


def optimizer_states(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the `state_dict` of an optimizer and of each inside it whose state is its own."""
    return [each.state_dict() for each in _with_own_state(optimizer)]


def check_states_fit(optimizer: Optimizer, states: list[dict[str, Any]]) -> None:
    """Raise `DataError` unless the states belong to an optimizer built like this one."""
    parts = _with_own_state(optimizer)
    sizes = [_sizes(each.param_groups) for each in parts]
    saved = [_sizes(state.get("param_groups", part.param_groups)) for part, state in zip(parts, states, strict=False)]
    if len(parts) != len(states) or sizes != saved:
        raise DataError(
            f"the run was saved with an optimizer of {saved} parameters by group, got {sizes}: build the optimizer, "
            "with the groups added since, as it was then"
        )


def load_states(optimizer: Optimizer, states: list[dict[str, Any]]) -> None:
    """Load what `optimizer_states` returned; groups that were shared with optimizers inside are shared again."""
    parts = _with_own_state(optimizer)
    links = [[_index(group, optimizer.param_groups) for group in each.param_groups] for each in parts]
    shared = [each.param_groups is optimizer.param_groups for each in parts]
    for each, state in zip(parts, states, strict=True):
        rates = [group.get("lr") for group in each.param_groups]
        each.load_state_dict(state)
        _restore_types(each, state)
        for group, rate in zip(each.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):  # a compiled update or a captured graph reads the rate from this very tensor
                group["lr"] = rate.copy_(torch.as_tensor(group["lr"]))
    for each, link, same_list in zip(parts[1:], links[1:], shared[1:], strict=True):
        for group, index in zip(each.param_groups, link, strict=True):
            optimizer.param_groups[index] = group
        if same_list:
            optimizer.param_groups = each.param_groups


def _with_own_state(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizer, and those inside that do not show its own state, as Accelerate's does."""
    return [optimizer, *(each for each in inside(optimizer) if each.state is not optimizer.state)]


def _sizes(groups: Iterable[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _index(group: object, groups: list[dict[str, Any]]) -> int:
    return next(index for index, each in enumerate(groups) if each is group)


def _restore_types(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put moments back as they were: `load_state_dict` casts them to the parameter's dtype, which loses bits."""
    parameters = list(parameters_of(optimizer))
    for index, saved in state.get("state", {}).items():
        own = optimizer.state[parameters[index]] if isinstance(index, int) else {}
        for name, value in saved.items() if isinstance(saved, Mapping) else ():
            if isinstance(value, Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device, copy=True)
