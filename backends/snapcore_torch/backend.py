"""The backend verbs for PyTorch: how a managed run drives the native loop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import SGD, Optimizer

from snapcore import DataError, Program
from snapcore.backend import Data, Pending, Report, resolved
from snapcore_torch.models import MODELS, Factory
from snapcore_torch.schedule import GroupRates
from snapcore_torch.state import (
    Copy,
    dump_training,
    load_training,
    load_weights,
    named_tensors,
    random_state,
    set_random_state,
    to_torch,
)
from snapcore_torch.training import DeviceFeed, Loop

Tensors = Mapping[str, NDArray[Any]]
Precision = Literal["float32", "bfloat16"]
_EVALUATION_BATCH = 1024


@dataclass
class TorchState:
    """What a managed run goes on with."""

    model: nn.Module
    optimizer: Optimizer
    loop: Loop
    device: torch.device
    random: dict[str, Any]
    """What dropout and the like draw from: the run's own, whatever else the process does."""


class TorchBackend:
    """Train natively in PyTorch, on the GPU if there is one."""

    name = "torch"

    def about(self) -> str:
        """Return PyTorch's version and the device it would use."""
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
        )
        return f"torch {torch.__version__} on {device}"

    def init(
        self,
        model: str | Factory,
        data: Data,
        program: Program,
        *,
        seed: int,
        member: int = 1,
        device: str | None = None,
        precision: Precision = "float32",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        optimizer: Callable[[nn.Module], Optimizer] | None = None,
    ) -> TorchState:
        """Return the state before the first update.

        Arguments:
            model: `"mlp"`, `"cnn"`, or a function of (input_shape, n_classes) that gives a module.
            data: examples, labels and their order; put on the device.
            program: gives the rates.
            seed: of the weights, together with `member`.
            member: whose fresh weights to make, from 1.
            device: such as `"cuda"` or `"cpu"`; by default the GPU if there is one.
            precision: what to compute in; weights stay float32.
            momentum: of SGD, in Nesterov's form.
            weight_decay: of SGD.
            optimizer: makes another optimizer for the model.

        Raises:
            DataError: no such model.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        module = _build(model, tuple(data.x.shape[1:]), data.n_classes, seed, member).to(place)
        chosen = optimizer(module) if optimizer else _sgd(module, program.schedule.lr, momentum, weight_decay)
        autocast = torch.bfloat16 if precision == "bfloat16" else None
        loop = Loop(module, chosen, DeviceFeed(data, place), program.schedule, GroupRates(chosen), autocast=autocast)
        with torch.random.fork_rng():
            torch.manual_seed(_seed(seed, 0))
            random = random_state()
        return TorchState(module, chosen, loop, place, random)

    def train(self, state: TorchState, start: int, stop: int, *, report: Report) -> TorchState:
        """Do updates `start … stop − 1`."""
        with _own_randomness(state):
            state.loop.run(start, stop, report)
        return state

    def capture(self, state: TorchState) -> Copy:
        """Return a copy of parameters and buffers."""
        return Copy(named_tensors(state.model))

    def restore(
        self,
        state: TorchState,
        tensors: Mapping[str, NDArray[Any]] | None,
        *,
        optimizer: Literal["keep", "reset"],
    ) -> TorchState:
        """Go on from `tensors`, the optimizer's moments kept or reset."""
        if tensors is not None:
            load_weights(state.model, tensors, "the member")
        if optimizer == "reset":
            state.optimizer.state.clear()
        return state

    def dump(self, state: TorchState) -> tuple[Copy, dict[str, Any]]:
        """Return a copy of weights, optimizer and random states."""
        copy, values = dump_training(state.model, state.model, state.optimizer, {})
        return copy, {"training": values, "random": state.random}

    def load(self, state: TorchState, tensors: Pending | Tensors, values: dict[str, Any]) -> TorchState:
        """Go on from what `dump` returned."""
        load_training(state.model, state.model, state.optimizer, {}, resolved(tensors), values["training"])
        state.random = values["random"]
        return state

    def logits(self, state: TorchState, x: NDArray[Any]) -> NDArray[np.float32]:
        """Return the outputs in evaluation mode; the state is left alone."""
        was_training = state.model.training
        state.model.eval()
        with torch.inference_mode():
            batches = torch.split(to_torch(x), _EVALUATION_BATCH)
            parts = [state.model(batch.to(state.device)) for batch in batches]
        state.model.train(was_training)
        return torch.cat(parts).float().cpu().numpy()


def _sgd(module: nn.Module, lr: float, momentum: float, weight_decay: float) -> SGD:
    return SGD(module.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay)


def _build(model: str | Factory, input_shape: tuple[int, ...], n_classes: int, seed: int, member: int) -> nn.Module:
    factory = MODELS.get(model) if isinstance(model, str) else model
    if factory is None:
        raise DataError(
            f"model must be one of {sorted(MODELS)} or a function of (input_shape, n_classes), got {model!r}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(_seed(seed, member))
        return factory(input_shape, n_classes)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _own_randomness(state: TorchState) -> Iterator[None]:
    callers = random_state()
    set_random_state(state.random)
    try:
        yield
    finally:
        state.random = random_state()
        set_random_state(callers)


if TYPE_CHECKING:
    from snapcore.backend import Backend

    _checked: Backend[TorchState] = TorchBackend()
