"""What a data loader draws from, so that it can be made part of the position in the data."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

Batch = TypeVar("Batch")
_PARTS = ("dataset", "sampler", "batch_sampler", "base_dataloader", "dataloader", "loader", "_loader")


def generators(loader: object) -> "list[torch.Generator | SeedHolder]":
    """Return what draws an order in a loader, its data set, its samplers and the loaders it wraps, each once."""
    found: dict[int, torch.Generator | SeedHolder] = {}
    seen = {id(loader)}
    holders = [loader]
    for holder in holders:
        for name in ("generator", "synchronized_generator", *_PARTS):
            part = getattr(holder, name, None)
            if name in _PARTS and type(getattr(part, "initial_seed", None)) is int:
                found[id(part)] = SeedHolder(part)
            if isinstance(part, torch.Generator):
                found[id(part)] = part
            elif name in _PARTS and part is not None and id(part) not in seen:
                seen.add(id(part))
                holders.append(part)
    return list(found.values())


class SeedHolder:
    """A sampler that shuffles by a seed and the epoch, such as Accelerate's: the seed may be another process's own."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def get_state(self) -> Tensor:
        """Return the seed as a generator returns its state."""
        return torch.tensor([self._sampler.initial_seed]).view(torch.uint8)

    def set_state(self, state: Tensor) -> None:
        """Set the seed."""
        self._sampler.initial_seed = int(state.clone().view(torch.int64))


def with_new_workers(loader: Iterable[Batch]) -> Iterable[Batch]:
    """Return the loader, or one that starts new workers every epoch if they would outlive it.

    A worker's random streams are seeded when it starts, and nobody can save them later on.
    """
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        return _NewWorkers(loader)
    return loader


class _NewWorkers(Generic[Batch]):
    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        epoch = copy.copy(self._loader)
        epoch._iterator = None  # the copy's own workers, which end with it
        return iter(epoch)
