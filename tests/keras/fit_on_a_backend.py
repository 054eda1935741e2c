"""Fit under the callback on what KERAS_BACKEND says, `python fit_on_a_backend.py folder`; write what was seen as JSON.

What a kill leaves is what lies in the folder at that moment: a copy of it is resumed.
"""

import json
import shutil
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from snapcore import CosineCycles, CycleWarning, program
from snapcore.store import SnapshotStore, read_point
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
    """Ends training after so many batches, once a point is on disk; leaves a copy of the folder as it is then."""

    def __init__(self, folder, after, step):
        super().__init__()
        self.folder, self.left, self.step = folder, after, step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            run = self.folder / "run"
            while len(SnapshotStore(run).members) < self.step[0] or self.point(run) != self.step[1]:
                time.sleep(0.01)
            shutil.copytree(self.folder, killed(self.folder))
            raise InterruptedError

    def point(self, run):
        point = read_point(run)
        return point and point.state["place"]["step"]


def killed(folder):
    """Where the copy is."""
    return folder.with_name(f"{folder.name} killed")


class Counted(SnapshotCallback):
    """Counts how often the model is looked at."""

    looks = 0

    @property
    def model(self):
        self.looks += 1
        return super().model


def network(cycles, rate=None, *, dropout=True, kind=keras.Sequential, **options):
    keras.utils.set_random_seed(1)
    drop = [layers.Dropout(0.2, seed=3), layers.Dropout(0.1)] if dropout else []
    model = kind([keras.Input((4,)), layers.Dense(8), layers.BatchNormalization(), *drop, layers.Dense(1)])
    model.compile(keras.optimizers.SGD(rate or SnapshotSchedule(cycles), momentum=0.9), "mse", **options)
    return model


def loader():
    """Return data that no draw from PyTorch's own generators is made for, where Keras runs on it; None elsewhere."""
    if keras.backend.backend() != "torch":
        return None
    torch = sys.modules["torch"]
    rows = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(rows, batch_size=4, generator=torch.Generator())


def fit(model, *callbacks, epochs=4, data=None, **options):
    if data is not None:
        return model.fit(data, epochs=epochs, callbacks=[*callbacks], verbose=0, **options)
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


def resumed(folder, cycles, when, *, beside=False):
    """Return how many batches a killed run took to resume, and whether its members are those of one never stopped.

    Arguments:
        folder: its own.
        cycles: of the run.
        when: after which batch to die, with how many members on disk, and the resume point of which update.
        beside: whether a backup puts the model where it resumes.
    """

    def others(path):
        return [backup(path)] if beside else []

    callback = SnapshotCallback(folder / "run", cycles)
    try:
        fit(network(cycles, dropout=not beside), callback, *others(folder), Die(folder, *when), data=loader())
    except InterruptedError:
        callback.close()
    watch, left = Watch(), killed(folder)
    fit(
        network(cycles, dropout=not beside), SnapshotCallback(left / "run", cycles), *others(left), watch, data=loader()
    )
    unbroken = Watch()
    fit(network(cycles, dropout=not beside), SnapshotCallback(folder / "unbroken", cycles), unbroken, data=loader())
    expected = {step: unbroken.weights[step] for step in cycles.snapshot_steps}
    return {
        "batches": len(watch.weights),
        "same": same(members(left / "run"), expected) and same(members(folder / "unbroken"), expected),
    }


def rates(folder, plain):
    """Return the rate of every update, and the members' steps, of one run or of two by one optimizer."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    model.compile(Shown(0.7 if plain else SnapshotSchedule(SHORT)), "mse")
    shown, found, as_seen = [], [], True
    for cycles in (SHORT, LONG) if plain else (SHORT,):
        watch, directory = Watch(), folder / f"rates {plain} {cycles.cycles}"
        fit(model, SnapshotCallback(directory, cycles), watch)
        shown.append([float(watch.weights[step][0].max()) for step in sorted(watch.weights)])
        found.append([*members(directory)])
        as_seen &= same(members(directory), {step: watch.weights[step] for step in cycles.snapshot_steps})
    return {"rates": shown, "steps": found, "same": as_seen}


def accumulated(folder):
    """Return the rates of the updates of two micro-batches each that an optimizer of a bare schedule does."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    model.compile(Shown(SnapshotSchedule(SHORT), gradient_accumulation_steps=2), "mse")
    watch = Watch()
    fit(model, SnapshotCallback(folder / "accumulated", SHORT), watch, epochs=8)
    return [float(watch.weights[2 * step][0].max()) for step in range(1, 25)]


def unbuilt(folder):
    """Return whether the members of a model that `fit` builds are what another callback sees."""
    model, watch = keras.Sequential([layers.Dense(8), layers.Dense(1)]), Watch()
    model.compile(keras.optimizers.SGD(SnapshotSchedule(SHORT), momentum=0.9), "mse")
    fit(model, SnapshotCallback(folder / "unbuilt", SHORT), watch)
    return same(members(folder / "unbuilt"), {step: watch.weights[step] for step in SHORT.snapshot_steps})


def error_in(floatx):
    """Return the largest error of a rate, by the first rate, where Keras' float type is that."""
    own = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        rate = SnapshotSchedule(SHORT)
        found = [float(ops.convert_to_numpy(ops.cast(rate(step), "float32"))) for step in range(24)]
    finally:
        keras.config.set_floatx(own)
    return max(abs(each - SHORT(step)) for step, each in enumerate(found)) / SHORT.lr


def looks(folder):
    """Return how often the model was looked at in 24 updates, beyond what a run without boundaries takes."""
    counts = []
    for name, cycles in (("few", CosineCycles(0.02, 1000, 1)), ("three", SHORT)):
        callback = Counted(folder / f"looks {name}", cycles)
        fit(network(cycles), callback, validation_data=(X, Y))
        counts.append(callback.looks)
    return counts


def alone(folder):
    """Return the steps of the members that a callback in no list takes."""
    callback = SnapshotCallback(folder / "alone", SHORT)
    network(SHORT).fit(X, Y, batch_size=4, epochs=4, verbose=0, callbacks=callback)
    return [*members(folder / "alone")]


class Begun(keras.callbacks.Callback):
    """Does something when a batch begins, and asks for no batch's end."""

    def __init__(self, batch, act):
        super().__init__()
        self.left, self.act = batch, act

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            self.act()


def die():
    raise InterruptedError


class Own(keras.Sequential):
    """Has a training step of its own, of which nothing is known."""

    def train_step(self, *data):
        return super().train_step(*data)


class Changes(keras.callbacks.Callback):
    """Changes the weights when an epoch ends, as averaging does, and asks for no batch's end."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.set_weights([each * 1.5 for each in self.model.get_weights()])


def unwatched(folder):
    """Return what a run does whose callback Keras calls at batches' ends in other threads, where it has any.

    Every run is compared with one that another callback has watched, which has Keras call it in its own thread.
    """
    star = program("star", lr=0.02, steps=21, cycles=3)
    found = {}
    for name, plan, options in (
        ("ends between epochs", SHORT, {}),
        ("ends within one", CosineCycles(0.02, 21, 3), {}),
        ("accumulates", CosineCycles(0.02, 21, 3), {"gradient_accumulation_steps": 2}),
        ("restarts", star, {}),
        ("steps by itself", SHORT, {"gradient_accumulation_steps": 4, "kind": Own}),
        ("is changed after", LONG, {"others": [Changes()]}),
    ):
        ends = []
        for watch in ([], [Watch()]):
            model = network(getattr(plan, "schedule", plan), 0.1, kind=options.get("kind", keras.Sequential))
            model.optimizer.gradient_accumulation_steps = options.get("gradient_accumulation_steps")
            callback = SnapshotCallback(folder / f"{name} {len(watch)}", plan)
            history = fit(model, *options.get("others", ()), callback, *watch, epochs=20)
            ends.append((history.epoch, int(model.optimizer.iterations), model.get_weights()))
        (*mine, weights), (*its, expected) = ends
        equal = same(members(folder / f"{name} 0"), members(folder / f"{name} 1"))
        found[name] = [*mine, mine == its and equal and same({0: weights}, {0: expected})]
    return {**found, "dies": died(folder / "dies"), "skips": skipped(folder / "skips")}


def died(folder):
    """Return whether a run that dies when a batch begins, the one before having led to a boundary, resumes exactly."""
    batches = []
    for batch in (9, 17):  # at 8 updates, and at 16
        callback = SnapshotCallback(folder, SHORT)
        try:
            fit(network(SHORT, dropout=False), Begun(batch - sum(batches), die), callback, data=loader())
        except InterruptedError:
            callback.close()
            batches.append(SnapshotStore(folder).members[-1].step)
    fit(network(SHORT, dropout=False), SnapshotCallback(folder, SHORT), data=loader())
    return [batches, [*members(folder)]]


def skipped(folder):
    """Return the members' steps, and the batches done, where the update is skipped that should have been the last."""
    model, rows, batches = keras.Sequential([keras.Input((4,)), layers.Dense(1)]), X.copy(), []
    rows[12:16] = np.inf  # the fourth of 6 batches, in each epoch: 20 updates in four epochs, and 3 before it
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=4.0), "mse")
    count = keras.callbacks.LambdaCallback()
    count.on_train_batch_begin = lambda batch, logs=None: batches.append(batch)
    model.fit(
        rows, Y, batch_size=4, epochs=9, shuffle=False, verbose=0, callbacks=[SnapshotCallback(folder, SHORT), count]
    )
    return [[*members(folder)], batches[-2:], len(batches)]


def at_once(folder):
    """Return the steps of members with several batches to an execution."""
    if keras.backend.backend() == "torch":  # refuses it
        return [8, 16, 24]
    fit(network(SHORT, steps_per_execution=4), SnapshotCallback(folder / "at once", SHORT), batch_size=3, epochs=3)
    return [*members(folder / "at once")]


def ended(folder, *inside, **options):
    """Return whether a run that ends after one epoch and after three gives the members of one that is never ended."""
    rows = np.random.default_rng(5).normal(size=(24, 3, 2)).astype("float32")
    for name, parts in (("whole", (4,)), ("parts", (1, 2, 1))):
        for epochs in parts:
            keras.utils.set_random_seed(1)
            model = keras.Sequential(
                [keras.Input(batch_shape=(4, 3, 2)), *(make() for make in inside), layers.Dense(1)]
            )
            model.compile(keras.optimizers.SGD(SnapshotSchedule(SHORT), momentum=0.9, **options), "mse")
            callback = SnapshotCallback(folder / name, SHORT)
            model.fit(rows, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback])
    return same(members(folder / "parts"), members(folder / "whole"))


def handed_over(folder):
    """Return the steps that a function of the user's is called with, and what is recorded with the members."""
    steps = []
    callback = SnapshotCallback(
        folder,
        SHORT,
        on_member=lambda snapshot: steps.append(snapshot.step),
        metrics=lambda snapshot: {"seen": float(snapshot.index)},
    )
    fit(network(SHORT), callback)
    return [steps, [member.metrics for member in SnapshotStore(folder).members]]


def main(folder):
    seen = {
        "backend": keras.backend.backend(),
        "own": resumed(folder / "own", LONG, (20, (1, 12))),
        "beside": resumed(folder / "beside", SHORT, (17, (2, 16)), beside=True),
        "schedule": rates(folder, plain=False),
        "plain": rates(folder, plain=True),
        "accumulated": accumulated(folder),
        "unbuilt": unbuilt(folder),
        "half": [error_in("bfloat16"), error_in("float16")],
        "looks": looks(folder),
        "alone": alone(folder),
        "unwatched": unwatched(folder),
        "at once": at_once(folder),
        "averages": ended(folder / "averages", layers.Flatten, use_ema=True),
        # On PyTorch, Keras itself cannot train them.
        "recurrent": keras.backend.backend() != "torch"
        and ended(folder / "recurrent", lambda: layers.GRU(3, stateful=True)),
        "handed over": handed_over(folder / "handed over"),
    }
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
