"""A run for loops in NumPy: a layer with running means, dropout and momentum, and the `SnapshotRun` that follows it.

It is here to show how little a run is, and to be broken on purpose.
"""

import numpy as np

from snapcore.ensemble import combine, member_files
from snapcore.run import Recorder
from snapcore.store import map_tensors


class Network:
    """What a framework would give: weights, an optimizer that counts, and a random state."""

    def __init__(self, seed):
        self.noise = np.random.default_rng(seed)
        self.weights = {"kernel": self.noise.normal(size=(3, 2)), "mean": np.zeros(3), "seen": np.zeros((), np.int64)}
        self.velocity = np.zeros((3, 2))
        self.count, self.rate = 0, 0.0

    def update(self, x):
        """Descend towards outputs of 1, in place."""
        self.weights["mean"] += 0.1 * (x.mean(0) - self.weights["mean"])
        self.weights["seen"] += 1
        kept = (x - self.weights["mean"]) * (self.noise.random(x.shape) > 0.2)
        self.velocity[:] = 0.9 * self.velocity + kept.T @ (kept @ self.weights["kernel"] - 1) / len(x)
        self.weights["kernel"] -= self.rate * self.velocity
        self.count += 1


class Source:
    """The network as the recorder sees it."""

    def __init__(self, network, fresh):
        self.network, self.fresh = network, fresh

    def settings(self):
        return {"optimizer": "momentum"}

    def capture(self):
        return {name: array.copy() for name, array in self.network.weights.items()}

    def restore(self, tensors, *, optimizer):
        if tensors is not None:
            self.network.weights = {name: array.copy() for name, array in tensors.items()}
        if optimizer == "reset":
            self.network.velocity[:] = 0

    def dump(self):
        weights = {f"weights/{name}": array.copy() for name, array in self.network.weights.items()}
        return {**weights, "velocity": self.network.velocity.copy()}, {"count": self.network.count}

    def load(self, tensors, values):
        self.network.weights = {name: tensors[f"weights/{name}"].copy() for name in self.network.weights}
        self.network.velocity = tensors["velocity"].copy()
        self.network.count = values["count"]

    def random_state(self):
        return self.network.noise.bit_generator.state

    def set_random_state(self, state):
        self.network.noise.bit_generator.state = state


class SnapshotRun:
    """Follow a network by its optimizer's count, and set its rate."""

    framework, make_source = "numpy", Source

    def __init__(self, directory, cycles, network, *, init=None, **options):
        self.network, self.source = network, self.make_source(network, init)
        self.recorder = Recorder(directory, cycles, self.source, framework=self.framework, **options)
        self.cursor = self.recorder.cursor
        self.recorder.start()
        self.before = network.count - self.cursor.step
        network.rate = self.cursor.lr

    @property
    def updates(self):
        return self.cursor.step

    @property
    def finished(self):
        return self.cursor.finished

    def step(self):
        self.recorder.record(self.network.count - self.before - self.cursor.step, late="take")
        self.network.rate = self.cursor.lr

    def batches(self, loader):
        return self.recorder.batches(loader)

    def finish(self, reason):
        self.recorder.finish(reason)

    def close(self):
        self.recorder.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.recorder.__exit__(*error)

    @classmethod
    def ensemble(cls, directory, x):
        """Return the mean probabilities of the finished members, and each one's; no dropout."""
        members = [probabilities(map_tensors(file), x) for file in member_files(directory, framework=cls.framework)]
        return combine(members), np.stack(members)


def probabilities(weights, x):
    outputs = np.exp((x - weights["mean"]) @ weights["kernel"])
    return outputs / outputs.sum(-1, keepdims=True)
