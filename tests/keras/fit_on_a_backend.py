"""Fit under the callback on what KERAS_BACKEND says: `python fit_on_a_backend.py begin|go_on folder`.

`begin` leaves two runs in the middle and dies; `go_on` ends them, does the others, and writes what it saw as JSON.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from snapcore import CosineCycles, CycleWarning, ProtocolError
from snapcore.resume import read_point
from snapcore.store import SnapshotStore
from snapcore_keras import SnapshotCallback, SnapshotSchedule

warnings.simplefilter("ignore", CycleWarning)
LONG, SHORT = CosineCycles(0.02, 24, 2), CosineCycles(0.02, 24, 3)  # epochs have 6 batches
DRAW = np.random.default_rng(0)
X, Y = DRAW.normal(size=(24, 4)).astype("float32"), DRAW.normal(size=(24, 1)).astype("float32")


class Shown(keras.optimizers.Optimizer):
    """Sets every weight to the rate of the update."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign(variable, ops.zeros(variable.shape) + ops.cast(learning_rate, variable.dtype))


class Watch(keras.callbacks.Callback):
    """Copies the weights after every batch."""

    def __init__(self):
        super().__init__()
        self.weights = {}

    def on_train_batch_end(self, batch, logs=None):
        self.weights[len(self.weights) + 1] = self.model.get_weights()


class Die(keras.callbacks.Callback):
    """Ends training as an error does, after so many batches, once a point of the run is on disk."""

    def __init__(self, run, after, step):
        super().__init__()
        self.run, self.left, self.step = run, after, step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            while len(SnapshotStore(self.run).members) < self.step[0] or self.point() != self.step[1]:
                time.sleep(0.01)
            raise InterruptedError

    def point(self):
        point = read_point(self.run)
        return point and point.state["place"]["step"]


class Counted(SnapshotCallback):
    """Counts how often the model is looked at."""

    looks = 0

    @property
    def model(self):
        self.looks += 1
        return super().model


def network(cycles, rate=None, *, dropout=True, **options):
    keras.utils.set_random_seed(1)
    drop = [layers.Dropout(0.2, seed=3)] if dropout else []
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.BatchNormalization(), *drop, layers.Dense(1)])
    model.compile(keras.optimizers.SGD(rate or SnapshotSchedule(cycles), momentum=0.9), "mse", **options)
    return model


def fit(model, *callbacks, epochs=4, **options):
    options = {"batch_size": 4, "verbose": 0, "shuffle": False, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=[*callbacks], **options)


def members(directory):
    store = SnapshotStore(directory)
    store.verify()
    return {member.step: [*store.load(member.index).values()] for member in store.members}


def same(found, expected):
    return [*found] == [*expected] and all(
        np.array_equal(*pair) for step in found for pair in zip(found[step], expected[step], strict=True)
    )


def backup(folder):
    return keras.callbacks.BackupAndRestore(folder / "backup", save_freq="epoch")


def begin(folder):
    for name, cycles, others, when in (
        ("own", LONG, [], (20, (1, 12))),
        ("beside", SHORT, [backup(folder)], (17, (2, 16))),
    ):
        try:
            callback = SnapshotCallback(folder / name, cycles)
            fit(network(cycles, dropout=not others), callback, *others, Die(folder / name, *when))
        except InterruptedError:
            continue
    os._exit(9)


def resumed(folder, name, cycles, *others):
    """Return where it went on, how many batches it took, and whether the members are those of a run never stopped."""
    watch, left = Watch(), SnapshotCallback(folder / name, cycles)
    fit(network(cycles, dropout=not others), left, *others, watch)
    unbroken = Watch()
    fit(network(cycles, dropout=not others), SnapshotCallback(folder / f"{name} unbroken", cycles), unbroken)
    expected = {step: unbroken.weights[step] for step in cycles.snapshot_steps}
    found = members(folder / name)
    return {
        "batches": len(watch.weights),
        "same": same(found, expected) and same(members(folder / f"{name} unbroken"), expected),
    }


def rates(folder, plain):
    """Return the rate of every update, and the members' steps."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    model.compile(Shown(0.7 if plain else SnapshotSchedule(SHORT)), "mse")
    watch, directory = Watch(), folder / f"rates {plain}"
    fit(model, SnapshotCallback(directory, SHORT), watch)
    return {
        "rates": [float(watch.weights[step][0].max()) for step in sorted(watch.weights)],
        "steps": [*members(directory)],
        "same": same(members(directory), {step: watch.weights[step] for step in SHORT.snapshot_steps}),
    }


def looks(folder):
    """Return how often the model was looked at in 24 updates, beyond what a run without boundaries takes."""
    counts = []
    for name, cycles in (("few", CosineCycles(0.02, 1000, 1)), ("three", SHORT)):
        callback = Counted(folder / f"looks {name}", cycles)
        fit(network(cycles), callback, validation_data=(X, Y))
        counts.append(callback.looks)
    return counts


def alone(folder):
    """Return what becomes of a callback that is in no list."""
    try:
        callback = SnapshotCallback(folder / "alone", SHORT)
        network(SHORT).fit(X, Y, batch_size=4, epochs=4, verbose=0, callbacks=callback)
    except ProtocolError as error:
        return str(error)
    finally:
        callback.close()
    return [*members(folder / "alone")]


def at_once(folder):
    """Return the steps of members with several batches to an execution."""
    if keras.backend.backend() == "torch":  # refuses it
        return [8, 16, 24]
    fit(network(SHORT, steps_per_execution=4), SnapshotCallback(folder / "at once", SHORT), batch_size=3, epochs=3)
    return [*members(folder / "at once")]


def go_on(folder):
    seen = {
        "backend": keras.backend.backend(),
        "own": resumed(folder, "own", LONG),
        "beside": resumed(folder, "beside", SHORT, backup(folder)),
        "schedule": rates(folder, plain=False),
        "plain": rates(folder, plain=True),
        "looks": looks(folder),
        "alone": alone(folder),
        "at once": at_once(folder),
    }
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    {"begin": begin, "go_on": go_on}[sys.argv[1]](Path(sys.argv[2]))
