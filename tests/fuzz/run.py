"""A run directory with one of everything that is ever read from one, as the library and the command write it."""

import random

import ml_dtypes
import numpy as np

from snapcore.data import TrainingData
from snapcore.ensemble import Cascade, Fitted, Predictions, Recipe
from snapcore.lab.history import History
from snapcore.lab.job import Job
from snapcore.lab.sealed import write_sealed
from snapcore.protocol import program
from snapcore.run import Recorder
from snapcore.store import SnapshotStore, check_fit, pack, unpack

PLAN = program("snapshot", lr=0.2, steps=60, cycles=3)  # members after 20, 40 and 60 updates
DATA = TrainingData(np.zeros((12, 3)), np.zeros(12, int), n_classes=1, batch_size=4)
MANIFEST, MEMBER, POINT = "snapcore.json", "snapshot-002.safetensors", "resume/point.safetensors"
JOB, RESULTS, HISTORY, PICTURE = "job.json", "results.json", "history.csv", "training.png"
PREDICTIONS, RECIPE = "predictions/test.safetensors", "recipe.json"
FILES = (MANIFEST, MEMBER, POINT, JOB, RESULTS, HISTORY, PICTURE, PREDICTIONS, RECIPE)


class Weights:
    """What is trained, and does what an adapter does: weights of several types, two of them tied, and an optimizer."""

    fresh = None

    def __init__(self):
        self.values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
        self.restored = None

    def settings(self):
        return {"optimizer": "momentum"}

    def capture(self):
        return {
            "w": self.values,
            "tied": self.values,
            "half": np.arange(3).astype(ml_dtypes.bfloat16),
            "mask": np.array([True, False]),
            "updates": np.array(7),
            "empty": np.zeros((0, 3), np.float16),
        }

    def dump(self):
        packed, tensors = pack({"moments": [np.ones(3)], "lr": 0.1, 3: None}, "optimizer", _is_array)
        return {**tensors, **{f"weights/{name}": array for name, array in self.capture().items()}}, {
            "optimizer": packed
        }

    def load(self, tensors, values):
        wanted, _ = self.dump()
        check_fit(*({name: each.shape for name, each in those.items()} for those in (tensors, wanted)), "the point")
        self.restored = unpack(values.get("optimizer"), tensors)

    def restore(self, tensors, *, optimizer):
        raise NotImplementedError

    def random_state(self):
        return None

    def set_random_state(self, state):
        pass


def _is_array(value):
    return isinstance(value, np.ndarray)


def make(directory, *, updates):
    """Leave a run after so many of its 60 updates; after 40, its resume point refers to a member."""
    random.seed(0)
    np.random.seed(0)
    with Recorder(directory, PLAN, Weights(), framework="numpy", metrics=lambda _: {"nll": 0.5}) as recorder:
        recorder.start()
        for _ in range(updates):
            recorder.record(1)
    Job(backend="numpy", cycles=3, lr=0.2, epochs=20).save(directory)
    write_sealed(directory / RESULTS, {"seconds": 1.5, "members": [{"index": 1, "nll": 0.5}], "ensemble": []})
    history = History(directory, PLAN.schedule)
    for step in range(1, updates + 1):
        history.report(step, 2.0 / step)
    history.write()
    members = [member.sha256 for member in SnapshotStore(directory).members]
    logs = np.log(np.random.default_rng(1).dirichlet(np.ones(3), size=(len(members), 8)))
    (directory / PREDICTIONS).parent.mkdir()
    Predictions(logs, np.arange(8) % 3, split="test", data="images", members=members).save(directory / PREDICTIONS)
    early = Cascade("margin", 0.5, (1.0, 1.5))
    fitted = Fitted(600, "held-out", 0.1)
    Recipe((0.25, 0.75), 1.5, early, fitted, tuple(members)).save(directory / RECIPE)
    (directory / PICTURE).write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x11tEXtSoftware\0snapcore\0\0\0\0")
