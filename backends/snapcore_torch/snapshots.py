"""Snapshots of a PyTorch module: the copy, the way back, and the run for a loop of your own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from snapcore import DataError, Program, ProtocolError, Restart, Schedule
from snapcore.run import Recorder, restart_weights
from snapcore.tensors import check_fit
from snapcore_torch.schedule import group_ratios, set_rate

Batch = TypeVar("Batch")
Tensors = Mapping[str, NDArray[Any]]
FreshWeights = Callable[[int], "nn.Module | Mapping[str, Tensor]"]


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module itself, out of `torch.compile` and (distributed) data-parallel wrappers."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's state: parameters and persistent buffers by their `state_dict` names, not copied.

    Raises:
        DataError: a part of the state (`get_extra_state`) is no tensor.
    """
    state = unwrapped(module).state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise DataError(f"a snapshot holds tensors, but {name!r} of the model's state is {type(value).__name__}")
    return dict(state)


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
    """Raise `DataError` unless the names and shapes are those of the module's state."""
    check_fit(shapes, {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}, what)


def load_weights(module: nn.Module, tensors: Tensors, what: str) -> None:
    """Copy named arrays into the module's own tensors.

    Raises:
        DataError: names or shapes are not the module's.
    """
    check_module_fit(module, {name: array.shape for name, array in tensors.items()}, what)
    unwrapped(module).load_state_dict({name: to_torch(array) for name, array in tensors.items()})


class SnapshotRun:
    """Take snapshots from a training loop of your own.

    It counts the optimizer's own steps, so `step()` may as well be called once per micro-batch. `step()` sets the
    rate of the next update; at the end of a cycle it first copies the weights, and the file is written behind the
    loop. No scheduler is needed beside it.

    Arguments:
        directory: the run's own; created.
        cycles_or_program: a schedule, or a program from `snapcore.program`.
        model: whose state is copied: parameters and persistent buffers.
        optimizer: the one optimizer that trains it. Groups keep their ratio to the reference rate.
        resume: False moves a run that is already there aside and starts anew.
        init: for programs with `fresh` restarts: gives a module or a state dict for a member number.
        reference_lr: the rate that the schedule stands for; by default found in the optimizer.

    Raises:
        StoreError: the directory holds a run, is being written, or cannot be written.
        ProtocolError: the program restarts from fresh weights and `init` is missing.
        DataError: the model's state holds something else than tensors.

    Example:
        >>> import tempfile, torch
        >>> from snapcore import CosineCycles
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SnapshotRun(folder, CosineCycles(lr=0.1, steps=64, cycles=4), model, optimizer) as run:
        ...         for x in run.batches([torch.randn(8, 4)]):
        ...             optimizer.zero_grad(); model(x).square().mean().backward(); optimizer.step()
        ...             run.step()
        ...     run.updates, run.finished
        (64, True)
    """

    def __init__(
        self,
        directory: str | Path,
        cycles_or_program: Schedule | Program,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        resume: bool = True,
        init: FreshWeights | None = None,
        reference_lr: float | None = None,
    ) -> None:
        program = cycles_or_program
        if isinstance(program, Program) and program.between.source == "fresh" and init is None:
            raise ProtocolError(
                f"{program.method} starts members from fresh weights: pass init=, a function that gives a module or a "
                "state dict for a member number"
            )
        named_tensors(model)
        self._model, self._optimizer, self._init = model, optimizer, init
        self._ratios = group_ratios(optimizer, reference_lr)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))  # another run finds the same ratios
        self._recorder = Recorder(directory, program, framework="torch", move_old_aside=not resume)
        self._cursor = self._recorder.cursor
        self._counted = 0
        self._hook = optimizer.register_step_post_hook(self._count)
        set_rate(optimizer, self._cursor.lr, self._ratios)

    @property
    def updates(self) -> int:
        """Updates recorded so far."""
        return self._cursor.step

    @property
    def finished(self) -> bool:
        """Whether the program has stopped."""
        return self._cursor.finished

    @property
    def lr(self) -> float:
        """The schedule's rate for the next update."""
        return self._cursor.lr

    def step(self, updates: int | None = None) -> None:
        """Record the updates done since the last call, take what is due, set the next rate.

        Arguments:
            updates: how many; by default those that the optimizer itself counted.

        Raises:
            ProtocolError: an update came after the program had stopped.
            StoreError, DivergedError: an earlier member could not be written or was refused.
        """
        n, self._counted = self._counted if updates is None else updates, 0
        for event in self._recorder.record(n, self._capture, late="take"):
            if isinstance(event, Restart):
                self._restart(event)
        if n:
            set_rate(self._optimizer, self._cursor.lr, self._ratios)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's batches, epoch after epoch, until the program stops."""
        return self._recorder.batches(loader)

    def finish(self, reason: str) -> None:
        """End early, with an unfinished member if an update was done since the last one."""
        self._recorder.finish(reason, self._capture)

    def close(self) -> None:
        """Wait for the writer and raise its error, if it has one."""
        self._hook.remove()
        self._recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, *_: object) -> None:
        self._counted += 1

    def _capture(self) -> Copy:
        return Copy(named_tensors(self._model))

    def _fresh(self, member: int) -> Tensors:
        weights = self._init(member)  # type: ignore[misc]  # refused at construction if missing
        return Copy(named_tensors(weights) if isinstance(weights, nn.Module) else weights).resolve()

    def _restart(self, restart: Restart) -> None:
        tensors = restart_weights(restart, self._recorder, self._fresh)
        if tensors is not None:
            load_weights(self._model, tensors, f"the {restart.source} weights")
        if restart.optimizer == "reset":
            self._optimizer.state.clear()
