"""The managed loop: Keras' own compiled update, batch by batch, in the order of the data."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from snapcore.backend import Data, Report, targets


def run(model: Any, data: Data, start: int, stop: int, report: Report, *, seed: int) -> None:
    """Do updates `start … stop − 1` of a compiled model; report the loss of each.

    Arguments:
        model: compiled; its optimizer has the rates.
        data: examples, targets and their order.
        start: updates done before.
        stop: updates done after.
        report: called with the updates done and the loss.
        seed: what random layers without a state of their own draw from, together with the step.
    """
    y = targets(data)
    with _own_randomness() as reseed:
        for step, rows in enumerate(data.indices(start, stop), start + 1):
            reseed(seed, step)
            logs = model.train_on_batch(data.x[rows], y[rows], return_dict=True)
            report(step, float(logs["loss"]))


@contextlib.contextmanager
def _own_randomness() -> Iterator[Callable[[int, int], object]]:
    """Give what seeds the draws of an update.

    Random layers keep their state among the model's variables, but for Keras' dropout on PyTorch, which draws from
    PyTorch's global state.
    """
    if keras.backend.backend() != "torch":
        yield lambda seed, step: None  # noqa: ARG005
        return
    torch = sys.modules["torch"]
    with torch.random.fork_rng():
        yield lambda seed, step: torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
