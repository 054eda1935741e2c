"""A module's and an optimizer's state as named tensors: the copy, and the way back."""

import hashlib
import json
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
from snapcore.run import WEIGHTS, Group
from snapcore.store import Tensors, check_fit, pack, unpack
from snapcore_torch.optimizers import check_states_fit, load_states, optimizer_states

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
MODEL = "model/"
"""What the names of the trained weights start with in a resume point, when others are the members'."""
_INTEGERS = {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
_STORABLE = {*_INTEGERS, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64}
TRAINING = "training"
"""What the names of all other tensors start with in a resume point."""


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
    """A copy of named tensors on their own device, on its way to the host.

    Tensors that are one, such as tied weights, are copied once, and `resolve` gives one array for all their names.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        copies: dict[tuple[Any, ...], Tensor] = {}
        self._tensors = {}
        for name, tensor in tensors.items():
            refuse_unstorable(name, tensor)
            memory = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            if memory not in copies:
                copies[memory] = tensor.detach().clone()
            self._tensors[name] = copies[memory]
        devices = {tensor.device for tensor in self._tensors.values() if tensor.is_cuda}
        self._copied = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    def resolve(self) -> dict[str, NDArray[Any]]:
        """Return the copy as host arrays; on CUDA it is fetched on a stream of its own, behind the loop."""
        streams = {device: torch.cuda.Stream(device) for device in self._copied}  # type: ignore[no-untyped-call]
        for device, stream in streams.items():
            stream.wait_event(self._copied[device])
        arrays: dict[int, NDArray[Any]] = {}
        for tensor in self._tensors.values():
            if id(tensor) not in arrays:
                with torch.cuda.stream(streams.get(tensor.device)):
                    arrays[id(tensor)] = to_numpy(tensor)
        return {name: arrays[id(tensor)] for name, tensor in self._tensors.items()}


def refuse_unstorable(name: str, tensor: Tensor) -> None:
    """Raise `DataError` if a file cannot hold the tensor."""
    dense = tensor.layout == torch.strided and tensor.device.type != "meta"
    if not dense or tensor.dtype not in _STORABLE:
        kind = tensor.layout if tensor.layout != torch.strided else tensor.dtype if dense else tensor.device
        raise DataError(
            f"{name.removeprefix(WEIGHTS)!r} is a {str(kind).removeprefix('torch.')} tensor, which a file of a run "
            "cannot hold: register it with persistent=False, or keep it dense and of another type"
        )


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
    check_loadable(module, tensors, what)
    inner = unwrapped(module)
    inner.load_state_dict({name: to_torch(tensors[plain_name(name)]) for name in inner.state_dict()})


def check_loadable(module: nn.Module, tensors: Tensors, what: str) -> None:
    """Raise `DataError` unless the module can load these arrays.

    A part that loads its own tensors in its own way, such as an observer of quantization whose ranges have no shape
    before they are seen, takes other shapes than it has.
    """
    loads_itself = tuple(
        plain_name(name + "." if name else "")
        for name, part in unwrapped(module).named_modules()
        if type(part)._load_from_state_dict is not nn.Module._load_from_state_dict
        and not type(part).__module__.startswith("torch.nn.")
    )
    own = {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}
    given = {
        name: own.get(name, array.shape) if name.startswith(loads_itself) else array.shape
        for name, array in tensors.items()
    }
    check_module_fit(module, given, what)


def pack_training(
    members: nn.Module,
    model: nn.Module,
    optimizer: Optimizer,
    own: Mapping[str, Any],
    states: Sequence[Mapping[str, Any] | None] = (),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all that training needs to resume, as tensors that are not copied and plain JSON for `load_training`.

    Arguments:
        members: whose weights become the members; most often `model` itself.
        model: what is trained.
        optimizer: what trains it.
        own: more objects with a `state_dict` that every process has alike, by name.
        states: each process's own `state_dict`s by name, from `states_of_all`.

    Raises:
        DataError: a state holds something that could only be pickled; the message names it.
    """
    tensors = {WEIGHTS + name: tensor for name, tensor in named_tensors(members).items()}
    if unwrapped(members) is not unwrapped(model):
        tensors |= {MODEL + name: tensor for name, tensor in named_tensors(model).items()}
    parts = {
        "optimizer": optimizer_states(optimizer),
        "own": {name: each.state_dict() for name, each in own.items()},
        "state": list(states),
    }
    values, found = pack(parts, TRAINING, torch.is_tensor)  # at once, so that no two names are the same
    return tensors | found, {"training": values}


def load_training(
    members: nn.Module,
    model: nn.Module,
    optimizer: Optimizer,
    own: Mapping[str, Any],
    state: Mapping[str, Any],
    tensors: Tensors,
    values: Mapping[str, Any],
    *,
    rank: int = 0,
) -> None:
    """Resume from what `pack_training` returned. What can be checked is checked before anything is changed.

    Arguments:
        members: as given to `pack_training`.
        model: as given to it.
        optimizer: as given to it.
        own: as given to it.
        state: the objects whose states `states_of_all` gathered; each gets this process's own, or process 0's if this
            one had none.
        tensors: what `pack_training` returned, as host arrays.
        values: what it returned beside them.
        rank: the number of this process.

    Raises:
        DataError: names or shapes are not the model's, or the optimizer or `state` are others than those saved.
    """
    saved = unpack(values["training"], {name: to_torch(tensors[name]) for name in tensors if name.startswith(TRAINING)})
    states = saved["state"] or [{}]
    mine = states[rank] if rank < len(states) and states[rank] is not None else states[0]
    names, wanted = {*saved["own"], *mine}, {*own, *state}
    if saved["own"].keys() != own.keys() or mine.keys() != state.keys():
        raise DataError(
            f"the run was saved with {sorted(names)} beside model and optimizer, got {sorted(wanted)}: give the same "
            "state= and scaler="
        )
    modules = {members: _part(tensors, WEIGHTS)}
    if unwrapped(members) is not unwrapped(model):
        modules[model] = _part(tensors, MODEL)
    for module, weights in modules.items():
        check_loadable(module, weights, "the resume point")
    check_states_fit(optimizer, saved["optimizer"])
    # The weights come last: what loads a state of the user's own may refuse it.
    for name, each in state.items():
        each.load_state_dict(mine[name])
    for name, each in own.items():
        each.load_state_dict(saved["own"][name])
    load_states(optimizer, saved["optimizer"])
    for module, weights in modules.items():
        load_weights(module, weights, "the resume point")


def states_of_all(state: Mapping[str, Any], group: Group) -> list[dict[str, Any] | None]:
    """Return the `state_dict` of each object in every process, None for a process that has what process 0 has."""
    mine = {name: each.state_dict() for name, each in state.items()}
    if group.size == 1 or not mine:
        return [mine]
    packed, tensors = pack(mine, "state", torch.is_tensor)
    digest = hashlib.sha256(json.dumps(packed).encode())
    for name, tensor in tensors.items():
        refuse_unstorable(name, tensor)
        digest.update(to_numpy(tensor).tobytes())
    digests = group.gather(digest.hexdigest())
    differs = digests[group.rank] != digests[0]
    host = {name: tensor.detach().cpu() for name, tensor in tensors.items()} if differs else {}
    others = group.gather((packed, host) if differs else None) if len(set(digests)) > 1 else []
    return [mine, *(None if each is None else unpack(*each) for each in others[1:])]


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


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
            f"the loader had {len(states)} generators when the epoch started, got {len(generators)}: build the "
            "loader as it was then"
        )
    for generator, each in zip(generators, states, strict=True):
        generator.set_state(_bytes(each))


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
