"""A run for loops in NumPy: a network of one layer with running means, dropout and momentum, and its `SnapshotRun`.

It is here to show how little a run is, and to be broken on purpose.
"""

import numpy as np

from snapcore import ProtocolError, Restart
from snapcore.ensemble import combine, member_files
from snapcore.protocol import as_program
from snapcore.run import Recorder, restart_weights
from snapcore.store import map_tensors


class Network:
    """What a framework would give: weights, an optimizer that counts, and a random state."""

    def __init__(self, seed):
        self.noise = np.random.default_rng(seed)
        self.weights = {"kernel": self.noise.normal(size=(3, 2)), "mean": np.zeros(3), "seen": np.zeros((), np.int64)}
        self.velocity = np.zeros((3, 2))
        self.count, self.rate = 0, 0.0

    def update(self, x):
        """Descend towards an output of 1, in place."""
        self.weights["mean"] += 0.1 * (x.mean(0) - self.weights["mean"])
        self.weights["seen"] += 1
        kept = (x - self.weights["mean"]) * (self.noise.random(x.shape) > 0.2)
        slope = kept.T @ (kept @ self.weights["kernel"] - 1) / len(x)
        self.velocity[:] = 0.9 * self.velocity + slope
        self.weights["kernel"] -= self.rate * self.velocity
        self.count += 1


def probabilities(weights, x):
    """Evaluation mode: no dropout."""
    outputs = np.exp((x - weights["mean"]) @ weights["kernel"])
    return outputs / outputs.sum(-1, keepdims=True)


def ensemble(directory, x):
    """Return the mean of the finished members, and each of them."""
    members = [probabilities(map_tensors(file), x) for file in member_files(directory, framework="numpy")]
    return combine(members), np.stack(members)


class Source:
    """The network as the recorder sees it."""

    def __init__(self, network):
        self.network = network

    def capture(self):
        return {name: array.copy() for name, array in self.network.weights.items()}

    def dump(self):
        weights = {f"weights/{name}": array for name, array in self.capture().items()}
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
    """Follows a network by its optimizer's count, and sets the rate."""

    source = Source

    def __init__(self, directory, cycles, network, *, init=None, **options):
        program = as_program(cycles)
        if program.between.source == "fresh" and init is None:
            raise ProtocolError("fresh weights are needed: pass init=")
        self.network, self._init = network, init
        self.recorder = Recorder(directory, program, self.source(network), framework="numpy", **options)
        self.cursor = self.recorder.cursor
        self.restart(self.recorder.start())
        self._before = network.count - self.cursor.step
        network.rate = self.cursor.lr

    @property
    def updates(self):
        return self.cursor.step

    @property
    def finished(self):
        return self.cursor.finished

    def step(self):
        new = self.network.count - self._before - self.cursor.step
        self.restart(self.recorder.record(new, late="take"))
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

    def restart(self, events):
        for event in events:
            if isinstance(event, Restart):
                tensors = restart_weights(event, self.recorder, self._init)
                if tensors is not None:
                    self.network.weights = {name: np.array(array) for name, array in tensors.items()}
                if event.optimizer == "reset":
                    self.network.velocity[:] = 0
