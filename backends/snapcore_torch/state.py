"""A module's and an optimizer's state as named tensors: the copy, and the way back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from snapcore import DataError
from snapcore.run import WEIGHTS
from snapcore.store import Tensors, check_fit, pack, unpack

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
MODEL = "model/"
"""What the names of the trained weights begin with in a resume point, when others are the members'."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module itself, out of `torch.compile`, `AveragedModel` and (distributed) data-parallel wrappers."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, _WRAPPERS):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's state: parameters and persistent buffers by their `state_dict` names, not copied.

    Compiled submodules have the names they had before they were compiled.

    Raises:
        DataError: a part of the state (`get_extra_state`) is no tensor.
    """
    state = unwrapped(module).state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise DataError(f"a snapshot holds tensors, but {name!r} of the model's state is {type(value).__name__}")
    return {plain_name(name): value for name, value in state.items()}


def plain_name(name: str) -> str:
    """Return a name of a module's state as it was before `torch.compile` wrapped a part."""
    return name.replace("_orig_mod.", "")


class Copy:
    """A copy of named tensors on their own device, on its way to the host."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        copies: dict[tuple[Any, ...], Tensor] = {}
        self._tensors = {}
        for name, tensor in tensors.items():
            place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            if place not in copies:  # tied weights are copied once
                copies[place] = tensor.detach().clone()
            self._tensors[name] = copies[place]
        devices = {tensor.device for tensor in self._tensors.values() if tensor.is_cuda}
        self._copied = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    def resolve(self) -> dict[str, NDArray[Any]]:
        """Return the copy as host arrays; on CUDA it is fetched on a stream of its own, behind the loop."""
        streams = {device: torch.cuda.Stream(device) for device in self._copied}  # type: ignore[no-untyped-call]
        for device, stream in streams.items():
            stream.wait_event(self._copied[device])
        arrays = {}
        for name, tensor in self._tensors.items():
            with torch.cuda.stream(streams.get(tensor.device)):
                arrays[name] = to_numpy(tensor)
        return arrays


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as a host array; bfloat16, which NumPy lacks, as ml_dtypes' own."""
    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()


def to_torch(array: NDArray[Any]) -> Tensor:
    """Return a host array as a tensor; it shares the memory of one that is writable and in C order."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def check_module_fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise `DataError` unless the names and shapes are those of the module's state.

    Lazy parameters, and parts with a `_load_from_state_dict` of their own such as observers, take shapes as they come.
    """
    wanted = {
        name: shapes.get(name, ()) if is_lazy(each) else each.shape for name, each in named_tensors(module).items()
    }
    for path, part in unwrapped(module).named_modules(remove_duplicate=False):
        kind = type(part)
        if not kind.__module__.startswith("torch.nn.") and (
            kind._load_from_state_dict is not nn.Module._load_from_state_dict
        ):
            owned = [plain_name(f"{path}.{name}".removeprefix(".")) for name in (*part._parameters, *part._buffers)]
            wanted |= {name: shapes[name] for name in owned if name in wanted and name in shapes}
    check_fit(shapes, {name: tuple(shape) for name, shape in wanted.items()}, what)


def load_weights(module: nn.Module, tensors: Tensors, what: str) -> None:
    """Copy named arrays into the module's own tensors.

    Raises:
        DataError: names or shapes are not the module's.
    """
    check_module_fit(module, {name: array.shape for name, array in tensors.items()}, what)
    inner = unwrapped(module)
    inner.load_state_dict({name: to_torch(tensors[plain_name(name)]) for name in inner.state_dict()})


def dump_training(
    members: nn.Module, model: nn.Module, optimizer: Optimizer, extras: Mapping[str, Any]
) -> tuple[Copy, dict[str, Any]]:
    """Return a copy of all that training needs to go on, as `load_training` takes it.

    Arguments:
        members: whose weights become the members; most often `model` itself.
        model: what is trained.
        optimizer: what trains it.
        extras: more objects with a `state_dict`, by name.

    Raises:
        DataError: a state holds something that could only be pickled; the message names it.
    """
    tensors = {WEIGHTS + name: tensor for name, tensor in named_tensors(members).items()}
    if unwrapped(members) is not unwrapped(model):
        tensors |= {MODEL + name: tensor for name, tensor in named_tensors(model).items()}
    values = {}
    for name, stateful in {"optimizer": optimizer, **extras}.items():
        values[name], found = pack(stateful.state_dict(), name, torch.is_tensor)
        tensors |= found
    return Copy(tensors), values


def load_training(
    members: nn.Module,
    model: nn.Module,
    optimizer: Optimizer,
    extras: Mapping[str, Any],
    tensors: Tensors,
    values: Mapping[str, Any],
) -> None:
    """Go on from what `dump_training` copied.

    Raises:
        DataError: names or shapes are not the model's, or the extras are others than those saved.
    """
    if values.keys() != {"optimizer", *extras}:
        raise DataError(f"the run was saved with {sorted(values)}; give the same state=, got {sorted(extras)}")
    load_weights(members, _part(tensors, WEIGHTS), "the resume point")
    if unwrapped(members) is not unwrapped(model):
        load_weights(model, _part(tensors, MODEL), "the resume point")
    rest = {name: to_torch(array) for name, array in tensors.items() if not name.startswith((WEIGHTS, MODEL))}
    _load_optimizer(optimizer, unpack(values["optimizer"], rest))
    for name, stateful in extras.items():
        stateful.load_state_dict(unpack(values[name], rest))


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    if len(state["param_groups"]) != len(optimizer.param_groups):
        raise DataError(
            f"the run was saved with {len(state['param_groups'])} parameter groups, got {len(optimizer.param_groups)}: "
            "build the optimizer as it was then"
        )
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, saved in state["state"].items():
        own = optimizer.state[parameters[place]]
        for name, value in saved.items():  # load_state_dict casts moments to the parameter's dtype, which loses bits
            if isinstance(value, Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device, copy=True)


def random_state(generators: Iterable[torch.Generator] = ()) -> dict[str, Any]:
    """Return PyTorch's random states as plain JSON: of the CPU, of every GPU in use, of other generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    others = [_hex(generator.get_state()) for generator in generators]
    return {"cpu": _hex(torch.get_rng_state()), "cuda": [_hex(state) for state in cuda], "generators": others}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set them to what `random_state` returned, but for other generators: see `set_generators`."""
    torch.set_rng_state(_bytes(state["cpu"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_bytes(each) for each in state["cuda"]])


def set_generators(generators: Sequence[torch.Generator], state: Mapping[str, Any]) -> None:
    """Set generators to the states that they had in `random_state`.

    Raises:
        DataError: there were more of them then, or fewer.
    """
    states = state["generators"]
    if len(generators) != len(states):
        raise DataError(
            f"the epoch was begun with {len(states)} generators in the loader, got {len(generators)}: build the "
            "loader as it was then"
        )
    for generator, each in zip(generators, states, strict=True):
        generator.set_state(_bytes(each))


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
