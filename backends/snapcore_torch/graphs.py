"""A call recorded as a CUDA graph, once for every shape of its inputs, and replayed without Python.

A graph holds addresses. It reads its inputs from memory of its own, to which every call's are copied first, and leaves
its output where the next replay overwrites it, so a copy is what is returned.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from snapcore import DataError
from snapcore.ensemble import reason
from snapcore_torch.trees import described, mapped

KEPT = 4
"""Graphs at most: each holds the memory of its whole call. The one that was used least recently goes."""

_WARM_UP = 3
_INSTEAD = "use strategy='loop'"

Run = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]
"""From the arguments of a call to its result."""


class Recorded(Protocol):
    """What was launched while it was recorded."""

    output: Tensor
    """Where a replay leaves the result."""

    def replay(self) -> None:
        """Launch it again."""
        ...


Record = Callable[[Callable[[], Tensor], torch.device], Recorded]


class CudaGraph:
    """The kernels that `run` launches on a device.

    Arguments:
        run: waits for nothing, and reads nothing on the host.
        device: a CUDA device.
    """

    def __init__(self, run: Callable[[], Tensor], device: torch.device) -> None:
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):  # libraries choose algorithms and allocate at their first calls
                    run()
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side):
                self.output = run()

    def replay(self) -> None:
        """Launch them again, on the current stream."""
        self._graph.replay()


class Graphs:
    """The graphs of one function, by what it is called with.

    Not for several threads or streams at once, which would share the inputs' memory.

    Arguments:
        record: makes a graph of a call.
        device_type: that of all tensors.
    """

    def __init__(self, record: Record = CudaGraph, device_type: str = "cuda") -> None:
        self._record, self._device_type = record, device_type
        self._kept: dict[Any, tuple[list[Tensor], Recorded]] = {}

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return a call's tensors.

        Raises:
            DataError: there is no CUDA device, a tensor is elsewhere, or one wants a gradient.
        """
        if self._device_type == "cuda" and not torch.cuda.is_available():
            raise DataError(f"strategy 'graph' needs a CUDA device, and PyTorch finds none: {_INSTEAD}")
        tensors: list[Tensor] = []
        mapped((args, kwargs), tensors.append)
        places = sorted({str(tensor.device) for tensor in tensors})
        if len(places) != 1 or tensors[0].device.type != self._device_type:
            found = " and ".join(places) or "no tensor"
            raise DataError(f"strategy 'graph' needs all inputs on one CUDA device, got {found}: {_INSTEAD}")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise DataError(f"a replayed graph gives no gradients: call it under torch.no_grad(), or {_INSTEAD}")
        return tensors

    def __call__(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], **also: bool) -> Tensor:
        """Return what `run` gives, replayed; it is recorded where there is no graph for such a call yet.

        Arguments:
            run: what is recorded.
            args: of the call.
            kwargs: of the call.
            **also: what else `run` depends on.

        Raises:
            DataError: see `check`; or `run` cannot be recorded. What `run` itself fails at is raised as it is.
        """
        tensors, kind = self.check(args, kwargs), self._device_type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        key = described((args, kwargs, also, autocast))
        if key in self._kept:
            kept = self._kept.pop(key)
        else:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            kept = self._recorded(run, args, kwargs, tensors[0].device)
        self._kept[key] = kept  # as the last one used
        inputs, graph = kept
        with torch.no_grad():
            for own, given in zip(inputs, tensors, strict=True):
                own.copy_(given)
        graph.replay()
        return graph.output.clone()

    def clear(self) -> None:
        """Forget all graphs, as when the weights lie elsewhere."""
        self._kept.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: no graph."""
        return {**self.__dict__, "_kept": {}}

    def _recorded(
        self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> tuple[list[Tensor], Recorded]:
        inputs: list[Tensor] = []

        def own(tensor: Tensor) -> Tensor:
            inputs.append(tensor.detach().clone())
            return inputs[-1]

        # Not in inference mode, whose tensors could not be written to outside of it.
        with torch.inference_mode(mode=False), torch.no_grad():
            fixed = mapped((args, kwargs), own)
            run(*fixed)  # what fails here too is not a matter of graphs
            try:
                return inputs, self._record(lambda: run(*fixed), device)
            except RuntimeError as error:
                raise DataError(
                    f"the ensemble cannot be recorded as a CUDA graph: {reason(error)}; {_INSTEAD}"
                ) from error
