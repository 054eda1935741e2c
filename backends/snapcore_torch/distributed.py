"""Several processes under `torchrun`: the group they form, and what must be equal in all of them."""

import functools
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from snapcore import DataError, ProtocolError
from snapcore.run import Alone, Group


class TorchGroup:
    """The processes of `torch.distributed`, as a run sees them.

    Values travel over a gloo group of its own, whatever the default group's backend is. Every process must make one
    at the same point of its program.

    Raises:
        ProtocolError: `torch.distributed` is not initialized.
    """

    def __init__(self) -> None:
        world = dist.group.WORLD if _initialized() else None
        if world is None:
            raise ProtocolError(
                "several processes need torch.distributed.init_process_group() before the run is opened; start them "
                "with torchrun"
            )
        self._channel = _channel(world)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._channel)
        return values


@functools.lru_cache(maxsize=1)
def _channel(world: dist.ProcessGroup) -> Any:  # noqa: ARG001 - one for each initialization
    return dist.new_group(backend="gloo")


def current_group() -> Group:
    """Return the processes that train together; without `torch.distributed`, this one alone.

    Example:
        >>> current_group().size
        1
    """
    return TorchGroup() if _initialized() and dist.get_world_size() > 1 else Alone()


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def refuse_sharded(module: nn.Module) -> None:
    """Raise `DataError` if one process does not hold all of the module's weights."""
    if not _initialized():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    sharded = [name for name, tensor in module.named_parameters() if isinstance(tensor, DTensor)]
    if sharded or any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise DataError(
            f"the model's parameters are sharded over the processes ({', '.join(sharded[:3]) or 'FSDP'}), and a "
            "snapshot is taken of whole ones: use DistributedDataParallel"
        )


def copy_from_first(tensors: dict[str, Tensor], group: Group) -> None:
    """Give every process the tensors of process 0, in place."""
    if group.size > 1:
        for tensor in tensors.values():
            dist.broadcast(tensor.detach(), src=0)


def mean_over_processes(tensor: Tensor, group: Group) -> Tensor:
    """Return the mean of every process's tensor; the one given, if this process is alone."""
    if group.size > 1:
        dist.all_reduce(tensor)
        return tensor / group.size
    return tensor
