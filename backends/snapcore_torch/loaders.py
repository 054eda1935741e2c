"""What a data loader draws from, so that it can be made part of the position in the data."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

Batch = TypeVar("Batch")


def generators(loader: object) -> list[torch.Generator]:
    """Return the generators that a loader, its data set and its samplers were given, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (
        loader,
        getattr(loader, "dataset", None),
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def with_new_workers(loader: Iterable[Batch]) -> Iterable[Batch]:
    """Return the loader, or one that starts new workers every epoch if they would outlive it.

    A worker's random streams are seeded when it starts, and nobody can save them later on.
    """
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        return _NewWorkers(loader)
    return loader


class _NewWorkers(Generic[Batch]):
    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._loader, self.sampler = loader, loader.sampler

    def __iter__(self) -> Iterator[Batch]:
        epoch = copy.copy(self._loader)
        epoch._iterator = None  # the copy's own workers, which end with it
        return iter(epoch)
