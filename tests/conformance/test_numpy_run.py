"""The rules for runs on a run of fifty lines, and on ones that break a single rule each."""

import numpy as np

from snapcore.testing import LoopConformance

from .numpy_run import Network, SnapshotRun, ensemble


class TestNumpyRun(LoopConformance):
    framework = "numpy"
    run = SnapshotRun

    def new(self, seed, schedule):
        return Network(seed)

    def init(self, seed, schedule):
        return Network(seed).weights

    def open(self, directory, cycles, subject, **options):
        return self.run(directory, cycles, subject, **options)

    def update(self, subject, x):
        subject.update(x)

    def weights(self, subject):
        return subject.weights

    def moments(self, subject):
        return [subject.velocity]

    def rate(self, subject):
        return subject.rate

    def spoil(self, subject):
        subject.weights["kernel"][0] = np.nan

    def ensemble(self, directory, x):
        return ensemble(directory, x)
