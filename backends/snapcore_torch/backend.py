"""The backend verbs for PyTorch: how a managed run drives the native loop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import update_bn

from snapcore import DataError, Program
from snapcore.backend import Data, Pending, Report, check_outputs, resolved
from snapcore.run import Group
from snapcore.store import Tensors
from snapcore_torch.batches import DeviceFeed
from snapcore_torch.distributed import current_group
from snapcore_torch.ema import AverageCount
from snapcore_torch.losses import make_loss
from snapcore_torch.models import MODELS, Factory
from snapcore_torch.options import UpdateOptions
from snapcore_torch.schedule import GroupRates
from snapcore_torch.state import (
    Copy,
    load_training,
    load_weights,
    named_tensors,
    pack_training,
    random_state,
    set_random_state,
    to_torch,
)
from snapcore_torch.training import Loop

_EVALUATION_BATCH = 1024


@dataclass
class TorchState:
    """What a managed run continues from."""

    model: nn.Module
    optimizer: Optimizer
    loop: Loop
    device: torch.device
    group: Group
    random: dict[str, Any]
    """What dropout and the like draw from: the run's own, whatever else the process does."""


class TorchBackend:
    """Train natively in PyTorch, on the GPU if there is one.

    Under `torchrun`, once `torch.distributed` is initialized, the processes share every batch: each computes its part
    and the gradients are averaged. Give `execute` the same `group=TorchGroup()`. Batch statistics are then those of a
    process's part, and a member's are process 0's.
    """

    name = "torch"

    def about(self) -> str:
        """Return PyTorch's version and the device it would use."""
        count = torch.get_num_threads()
        cpu = f"cpu, {count} thread" if count == 1 else f"cpu, {count} threads"
        return f"torch {torch.__version__} on {torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}"

    def threads(self) -> int:
        """Return how many CPU threads an operation is spread over."""
        return torch.get_num_threads()

    def init(
        self,
        model: str | Factory,
        data: Data,
        program: Program,
        *,
        seed: int,
        member: int = 1,
        device: str | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        optimizer: Callable[[nn.Module], Optimizer] | str = "sgd",
        **options: Any,
    ) -> TorchState:
        """Return the state before the first update.

        Arguments:
            model: `"mlp"`, `"cnn"`, `"fcn"`, or a function of (input_shape, n_outputs) that gives a module.
            data: examples, targets, their order and the loss; put on the device.
            program: gives the rates.
            seed: of the weights, together with `member`.
            member: whose fresh weights to make, from 1.
            device: such as `"cuda"` or `"cpu"`; by default the GPU if there is one.
            momentum: of SGD, in Nesterov's form.
            weight_decay: of the optimizer; AdamW's is decoupled from the gradient.
            optimizer: `"sgd"`, `"adamw"`, or a function that makes another optimizer for the model.
            options: how an update is done, see `UpdateOptions`.

        Raises:
            DataError: no such model, device or optimizer, an option that the data does not allow, or a model whose
                outputs do not fit the data's targets.
        """
        how, group = UpdateOptions(**options), current_group()
        chosen_device = _device(device)
        _check_batches(data, how, group)
        module = _build(model, tuple(data.x.shape[1:]), data.n_outputs, seed, member).to(chosen_device)
        check_outputs(data, lambda x: _output_shape(module, to_torch(x).to(chosen_device)))
        chosen = _optimizer(optimizer, module, program.schedule.lr, momentum, weight_decay)
        feed = DeviceFeed(data, chosen_device, group)
        rates, loss = GroupRates(chosen), make_loss(data.loss, data.ignore)
        loop = Loop(module, chosen, feed, program.schedule, rates, loss, how, group, data.ignore)
        with torch.random.fork_rng():
            torch.manual_seed(_seed(seed, 0, *([group.rank] if group.rank else [])))
            random = random_state()
        return TorchState(module, chosen, loop, chosen_device, group, random)

    def train(self, state: TorchState, start: int, stop: int, *, report: Report) -> TorchState:
        """Do updates `start … stop − 1`."""
        with _own_randomness(state):
            state.loop.run(start, stop, report)
        return state

    def capture(self, state: TorchState) -> Copy:
        """Return a copy of parameters and buffers: the averages, if there are any."""
        return Copy(named_tensors(state.loop.members))

    def restore(
        self,
        state: TorchState,
        tensors: Mapping[str, NDArray[Any]] | None,
        *,
        optimizer: Literal["keep", "reset"],
    ) -> TorchState:
        """Continue from `tensors`, the optimizer's moments kept or reset; averages of other weights start over."""
        if tensors is not None:
            load_weights(state.model, tensors, "the member")
            if state.loop.average is not None:
                load_weights(state.loop.average, tensors, "the member")
                AverageCount(state.loop.average).start_over()
        if optimizer == "reset":
            state.optimizer.state.clear()
        return state

    def dump(self, state: TorchState) -> tuple[Copy, dict[str, Any]]:
        """Return a copy of weights, optimizer, loss scale, averages and random states; process 0's alone is full."""
        random = state.group.gather(state.random)
        if state.group.rank:
            return Copy({}), {}
        tensors, values = pack_training(*_parts(state))
        return Copy(tensors), {**values, "random": random}

    def load(self, state: TorchState, tensors: Pending | Tensors, values: dict[str, Any]) -> TorchState:
        """Resume from what `dump` returned."""
        load_training(*_parts(state), {}, resolved(tensors), values)
        if state.group.rank < len(values["random"]):  # a process that was not there before draws from its own seed
            state.random = values["random"][state.group.rank]
        return state

    def logits(self, state: TorchState, x: NDArray[Any]) -> NDArray[np.float32]:
        """Return what a member taken now would, in evaluation mode and float32; the state is left alone."""
        module = state.loop.members
        was_training = module.training
        module.eval()
        with torch.inference_mode():
            batches = torch.split(to_torch(x), _EVALUATION_BATCH)
            parts = [module(batch.to(state.device)) for batch in batches]
        module.train(was_training)
        return torch.cat(parts).float().cpu().numpy()

    def refresh(self, state: TorchState, x: NDArray[Any]) -> TorchState:
        """Return the state with batch statistics re-estimated on inputs `x`; random states are left alone."""
        parts = np.array_split(x, max(1, -(-len(x) // _EVALUATION_BATCH)))
        callers = random_state()
        update_bn(map(to_torch, parts), state.loop.members, device=state.device)
        set_random_state(callers)
        return state


def _parts(state: TorchState) -> tuple[nn.Module, nn.Module, Optimizer, dict[str, Any]]:
    loop = state.loop
    extras: dict[str, Any] = {"scaler": loop.scaler} if loop.scaler.is_enabled() else {}
    if loop.average is not None:
        extras["average"] = AverageCount(loop.average)
    return loop.members, state.model, state.optimizer, extras


def _check_batches(data: Data, options: UpdateOptions, group: Group) -> None:
    share = data.indices(0, 1).shape[1] // group.size
    if options.accumulate > share:
        raise DataError(f"accumulate must be in 1..{share}, a process's examples per update; got {options.accumulate}")
    if options.channels_last and data.x.ndim != 4:
        raise DataError(f"channels_last needs images, [examples, channels, height, width]; got shape {data.x.shape}")


def _output_shape(module: nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of what a module returns in evaluation mode; nothing is changed."""
    was_training = module.training
    module.eval()
    with torch.no_grad(), torch.random.fork_rng():
        outputs = module(x)
    module.train(was_training)
    if not isinstance(outputs, torch.Tensor):
        raise DataError(f"the model must return one tensor, got {type(outputs).__name__}: return its outputs alone")
    return tuple(outputs.shape)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:  # no such name, or nothing behind it
        cause = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"device must be one that PyTorch can use here, got {name!r}: {cause}; try cpu") from error
    return device


def _optimizer(
    chosen: Callable[[nn.Module], Optimizer] | str, module: nn.Module, lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    if not isinstance(chosen, str):
        return chosen(module)
    if chosen == "sgd":
        return SGD(module.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay)
    if chosen == "adamw":
        return AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    raise DataError(f"optimizer must be 'sgd', 'adamw' or a function of the model, got {chosen!r}")


def _build(model: str | Factory, input_shape: tuple[int, ...], n_outputs: int, seed: int, member: int) -> nn.Module:
    factory = MODELS.get(model) if isinstance(model, str) else model
    if factory is None:
        raise DataError(
            f"model must be one of {sorted(MODELS)} or a function of (input_shape, n_outputs), got {model!r}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(_seed(seed, member))
        return factory(input_shape, n_outputs)


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
