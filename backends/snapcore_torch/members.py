"""Members as modules of their own: copied or built, and given their weights the way PyTorch loads them.

A copy of a module shares the functions that its attributes and hooks hold, with all that those close over. What still
refers to the model that was copied would run that model's weights, so it is refused.
"""

import copy
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from snapcore import DataError
from snapcore.ensemble import reason
from snapcore.store import map_tensors, tied_names
from snapcore_torch.state import check_module_fit, named_tensors, plain_name, to_torch, unwrapped

Build = Callable[[], nn.Module]

CURE = "pass a freshly built model, or the function that builds it"
_COPY_ERRORS = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError, pickle.PickleError)


def load_members(model: nn.Module | Build, files: Iterable[Path], *, mapped: bool) -> Iterator[nn.Module]:
    """Load each file into a module of its own.

    Arguments:
        model: the architecture, which is copied; or a function that builds it.
        files: the members'.
        mapped: whether weights on the CPU stay in their files instead of being copied.

    Raises:
        DataError: a member's names and shapes are not the model's, or the model cannot be copied rightly.
    """
    paths = list(files)
    if isinstance(model, nn.Module):
        original = _original(model)
        for file in paths:
            yield _loaded(original, file, mapped=mapped, is_new=False)
        return
    if not callable(model):
        raise DataError(f"model must be an nn.Module or a function that builds one, got {type(model).__name__}")
    built = [_original(model()) for _ in paths]
    seen: set[int] = set()
    for module in built:
        own = {id(tensor): name for name, tensor in module.state_dict(keep_vars=True).items()}
        if shared := [name for key, name in own.items() if key in seen]:
            raise DataError(f"the function must build all of the model anew, but two have one {shared[0]!r}")
        seen |= own.keys()
    for module, file in zip(built, paths, strict=True):
        yield _loaded(module, file, mapped=mapped, is_new=True)


def _original(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise DataError(f"the function that builds the model must return an nn.Module, got {type(model).__name__}")
    original = unwrapped(model)
    for module in model.modules():
        if module is original:
            break
        if module._forward_hooks or module._forward_pre_hooks:
            raise DataError(
                f"the model's wrapper {type(module).__name__} has forward hooks, which members would lose: register "
                "them on the model inside"
            )
    keras = sys.modules.get("keras")
    if keras is not None and any(isinstance(module, keras.Layer) for module in original.modules()):
        raise DataError("a model of Keras copies itself under other names: load the run with snapcore_keras instead")
    return original


def _loaded(source: nn.Module, file: Path, *, mapped: bool, is_new: bool) -> nn.Module:
    own = source.state_dict(keep_vars=True)
    named_tensors(source)
    on_meta = any(tensor.is_meta for tensor in own.values())
    device = next((tensor.device for tensor in own.values() if not tensor.is_meta), torch.device("cpu"))
    if mapped:
        tensors = load_file(file, device=str(device))
        tensors |= {name: tensors[stored] for name, stored in tied_names(file).items()}
    else:
        tensors = {name: to_torch(array) for name, array in map_tensors(file).items()}
    check_module_fit(source, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, str(file))
    new: dict[int, Tensor] = {}  # by what it replaces, so that tied weights stay tied
    state = {}
    for name, tensor in own.items():
        given = tensors[plain_name(name)]
        like = nn.Parameter(given, requires_grad=False) if isinstance(tensor, nn.Parameter) else given
        state[name] = new.setdefault(id(tensor), like)
    assign = mapped or on_meta
    uncopied = {id(tensor) for tensor in own.values() if assign or is_lazy(tensor)}
    member = source if is_new else _copied(source, {key: new[key] for key in uncopied})
    try:
        member.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise DataError(f"{file} cannot be loaded into {type(source).__name__}: {reason(error)}") from error
    for name, tensor in chain(member.named_parameters(), member.named_buffers()):
        if tensor.is_meta:
            raise DataError(f"{name!r} is on the meta device and in no member: build the model on the CPU")
    return member


def _copied(model: nn.Module, replaced: Mapping[int, Tensor]) -> nn.Module:
    """Copy a module, with other tensors for some of its own wherever it refers to them."""
    memo: dict[int, Any] = dict(replaced)
    own = {id(each) for each in chain(model.modules(), model.parameters(), model.buffers())}
    weights = {_memory(parameter) for parameter in model.parameters()} - {None}
    for module in model.modules():
        for attribute, value in vars(module).items():
            by_hook = f"{attribute}_orig" in module._parameters  # of old spectral normalisation: computed at each call
            for tensor in _tensors(value):
                if id(tensor) not in own and _memory(tensor) in weights and not by_hook:
                    raise DataError(f"{attribute!r} is a view of the weights, which it would not be in a copy: {CURE}")
                if not tensor.is_leaf:  # a kept activation, or a weight that a hook computes: its graph is not copied
                    memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        with torch.no_grad():  # TorchScript copies its tensors by an operation, which would have a gradient
            member: nn.Module = copy.deepcopy(model, memo)
    except _COPY_ERRORS as error:
        raise DataError(f"{type(model).__name__} cannot be copied, {reason(error)!r}: {CURE}") from error
    kept = {id(tensor) for tensor in member.state_dict(keep_vars=True).values()}
    if not kept.issuperset(map(id, replaced.values())):
        raise DataError(f"{type(model).__name__} copies itself in a way of its own: {CURE}, and leave mapped out")
    _refuse_bound(member, own, memo)
    return member


def _refuse_bound(member: nn.Module, own: set[int], memo: dict[int, Any]) -> None:
    """Refuse a copy whose functions refer to the model with these parts; a compiled method becomes a plain one."""
    for name, module in member.named_modules():
        for attribute, value in list(vars(module).items()):
            if getattr(value, "_torchdynamo_wrapper_id", None) == id(value):  # not where functools.wraps has copied it
                plain = value._torchdynamo_orig_callable
                if (
                    getattr(plain, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils"
                ):  # what inlines a method
                    plain = plain.__wrapped__
                value = vars(module)[attribute] = copy.deepcopy(plain, memo)  # noqa: PLW2901
            runs = hasattr(type(module), attribute) or attribute.endswith("_hooks")
            if _reaches(value, own, set(), objects=runs):
                where = f"{attribute!r} of {name!r}" if name else f"{attribute!r}"
                raise DataError(f"{where} is bound to the given model, and a copy would run its weights: {CURE}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _memory(tensor: Tensor) -> int | None:
    """Return where a tensor's memory begins; None for one that has none of its own kind."""
    if is_lazy(tensor) or tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage().data_ptr() or None


def _reaches(value: Any, own: set[int], seen: set[int], *, objects: bool) -> bool:
    """Return whether a function, or one in a container, refers to one of the objects with these ids.

    Arguments:
        value: an attribute of a copy. What is no function was copied, with all that it holds.
        own: ids of the original's modules and tensors.
        seen: ids of what has been looked at.
        objects: whether to look into callable objects too.
    """
    if id(value) in own:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, FunctionType):
        parts, objects = _parts(value), True
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set):
        parts = list(value)
    elif isinstance(value, MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, ReferenceType):
        parts = [value()]
    elif callable(value) and not isinstance(value, type | nn.Module | Tensor):
        held = getattr(value, "__dict__", {})
        parts = list(held.values()) if objects else [held.get("__wrapped__")]
    else:
        return False
    return any(_reaches(part, own, seen, objects=objects) for part in parts)


def _parts(function: FunctionType) -> list[Any]:
    """Return what a function refers to: what it closes over and what that holds, defaults, attributes, globals."""
    held = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    instances = [each for each in held if not isinstance(each, type | ModuleType | FunctionType)]
    held += [part for each in instances for part in getattr(each, "__dict__", {}).values()]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    return held + [each for each in named if isinstance(each, nn.Module | Tensor)]
