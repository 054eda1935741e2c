"""What a data loader draws from, so that it can be made part of the position in the data."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

Batch = TypeVar("Batch")
_PARTS = ("dataset", "sampler", "batch_sampler", "base_dataloader", "dataloader", "loader", "_loader")


def generators(loader: object) -> list[torch.Generator]:
    """Return the generators that a loader, its data set, its samplers and the loaders it wraps have, each once."""
    found: dict[int, torch.Generator] = {}
    seen = {id(loader)}
    holders = [loader]
    for holder in holders:
        for name in ("generator", "synchronized_generator", *_PARTS):
            part = getattr(holder, name, None)
            if isinstance(part, torch.Generator):
                found[id(part)] = part
            elif name in _PARTS and part is not None and id(part) not in seen:
                seen.add(id(part))
                holders.append(part)
    return list(found.values())


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
