"""Score the last members of a run in a process of its own, and print the memory that this took, in MB.

    python memory_probe.py whole|lazy DIRECTORY MEMBERS

`whole` loads them as one `SnapshotEnsemble`; `lazy` fetches one after the other from the store and scores every
prefix. Printed are the peaks above what was there before scoring: of private memory (RssAnon) and of mapped files
(RssFile), which the kernel may drop at any time. Both are read from Linux's /proc while the scoring runs.
"""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from snapcore.ensemble import prefix_curve
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble

KINDS = ("RssAnon", "RssFile")
EXAMPLES, WIDTH, LAYERS = 64, 1000, 25


class OnDemand:
    """Probabilities of the last members, each computed when it is asked for, with one and the same module."""

    def __init__(self, directory: str, model: nn.Module, x: Tensor, members: int) -> None:
        self._store = SnapshotStore(directory)
        self._indexes = [member.index for member in self._store.members[-members:]]
        self._model, self._x = model, x

    def __len__(self) -> int:
        return len(self._indexes)

    def __getitem__(self, index: int) -> NDArray[Any]:
        weights = self._store.load(self._indexes[index])
        self._model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        return self._model(self._x).softmax(-1).numpy()


def whole(directory: str, model: nn.Module, x: Tensor, members: int) -> None:
    SnapshotEnsemble.load(directory, model, last=members, mapped=True)(x)


def lazy(directory: str, model: nn.Module, x: Tensor, members: int) -> None:
    prefix_curve(OnDemand(directory, model, x, members), np.zeros(len(x), int))


def resident() -> dict[str, float]:
    status = Path("/proc/self/status").read_text()
    return {kind: int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) / 1000 for kind in KINDS}


@contextmanager
def peaks() -> Iterator[Callable[[], dict[str, float]]]:
    """Read the resident memory a thousand times a second; give a function that tells by how much it rose."""
    before = highest = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            now = resident()
            highest = {kind: max(highest[kind], now[kind]) for kind in KINDS}

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: {kind: highest[kind] - before[kind] for kind in KINDS}
    finally:
        done.set()
        thread.join()


def main(kind: str, directory: str, members: str) -> None:
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    x = torch.randn(EXAMPLES, WIDTH)
    with torch.inference_mode():
        model(x).softmax(-1)
        with peaks() as rise:
            {"whole": whole, "lazy": lazy}[kind](directory, model, x, int(members))
    print(json.dumps(rise()))


if __name__ == "__main__":
    main(*sys.argv[1:])
