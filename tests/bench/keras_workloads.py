"""What is run in the benchmarks of the Keras and TensorFlow adapters, imported within them.

As a program it prints what `fit` takes with the callback and without, on the backend that `KERAS_BACKEND` names:

    python -m tests.bench.keras_workloads DIRECTORY PAIRS mlp|cnn
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from snapcore import CosineCycles
from snapcore.data import TrainingData
from snapcore_keras import SnapshotCallback, SnapshotSchedule
from snapcore_keras.models import MODELS

from .compare import SECONDS, Contender

LR, BATCH, EPOCHS = 0.05, 64, 4
STEPS = {"mlp": 100, "cnn": 15}
LONG = CosineCycles(lr=LR, steps=10**6, cycles=2)  # nothing is due while anything is timed


class Clock(keras.callbacks.Callback):
    """Tell how long every epoch but the first took, which compiles; it has no hook for batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self._began = 0.0, 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds += (time.perf_counter() - self._began) if epoch else 0.0


class Empty(keras.callbacks.Callback):
    """Do nothing at the end of a batch, for which Keras brings the batch's loss to the host."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


def fitting(name: str, callbacks: Callable[[int], list[Any]]) -> Callable[[], float]:
    """Return what fits a built-in model to noise, and gives seconds per update, with callbacks of their own a time."""
    random = np.random.default_rng(0)
    x = random.standard_normal((BATCH * STEPS[name], 1, 8, 8), dtype=np.float32)
    y = random.integers(0, 10, len(x))
    model = MODELS[name]((1, 8, 8), 10)
    number = 0

    def fit() -> float:
        nonlocal number
        number += 1
        model.compile(
            keras.optimizers.SGD(SnapshotSchedule(LONG), momentum=0.9, nesterov=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        clock = Clock()
        every = [clock, *callbacks(number)]
        model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, shuffle=False, callbacks=every)
        return clock.seconds / (EPOCHS - 1) / STEPS[name]

    return fit


def timed(directory: Path, pairs: int, model: str) -> dict[str, list[float]]:
    """Return seconds per update, with the callback, without, and with an empty one, in turns."""
    contenders = {
        "with": fitting(model, lambda number: [SnapshotCallback(directory / str(number), LONG)]),
        "without": fitting(model, lambda _: []),
        "with a callback that does nothing": fitting(model, lambda _: [Empty()]),
    }
    for fit in contenders.values():
        fit()
    end = time.monotonic() + SECONDS
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(pairs):
        if turn and time.monotonic() > end:
            break
        for name in sorted(contenders, reverse=bool(turn % 2)):
            times[name].append(contenders[name]())
    return times


def updating(rate: Any, updates: int) -> Contender:
    """Give compiled updates of 32 × 32 weights by SGD at a rate: small, so that the rate is a part of their time."""
    import tensorflow as tf

    weights = keras.Variable(np.ones((32, 32), np.float32))
    optimizer = keras.optimizers.SGD(rate)
    optimizer.build([weights])

    @tf.function(autograph=False)
    def update() -> None:
        optimizer.apply([weights.value * 1e-3], [weights])

    def run() -> None:
        for _ in range(updates):
            update()

    return Contender(run, units=updates)


def managed(data: TrainingData, model: str, updates: int) -> Contender:
    """Give updates by TensorFlow's adapter."""
    from snapcore import Program
    from snapcore_tensorflow.backend import TensorFlowBackend

    backend = TensorFlowBackend()
    state = backend.init(model, data, Program("bench", LONG), seed=0)

    def run() -> None:
        backend.train(state, 0, updates, report=lambda _, loss: None)

    return Contender(run, units=updates)


def by_hand(data: TrainingData, model: str, updates: int, *, loop: str) -> Contender:
    """Give the same updates as one would write them: `"tensorflow"` compiles the loop too, `"python"` one update."""
    import tensorflow as tf

    network = MODELS[model](data.x.shape[1:], data.n_classes)
    decay = keras.optimizers.schedules.CosineDecay(LR, LONG.steps // 2)
    optimizer = keras.optimizers.SGD(decay, momentum=0.9, nesterov=True)
    optimizer.build(network.trainable_variables)
    x, y = tf.constant(data.x), tf.constant(data.y)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def update(rows: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_fn(tf.gather(y, rows), network(tf.gather(x, rows), training=True))
        weights = network.trainable_variables
        gradients = tape.gradient(loss, weights)
        optimizer.apply([g + 1e-4 * w.value for g, w in zip(gradients, weights, strict=True)], weights)
        return loss

    @tf.function
    def every(rows: Any) -> Any:
        losses = tf.TensorArray(tf.float32, tf.shape(rows)[0])
        for row in tf.range(tf.shape(rows)[0]):
            losses = losses.write(row, update(rows[row]))
        return losses.stack()

    one = tf.function(update)

    def compiled() -> None:
        every(tf.constant(data.indices(0, updates))).numpy()

    def called() -> None:
        for rows in data.indices(0, updates):
            loss = one(tf.constant(rows))
        loss.numpy()

    return Contender({"tensorflow": compiled, "python": called}[loop], units=updates)


if __name__ == "__main__":
    print(json.dumps(timed(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
