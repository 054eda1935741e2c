"""A small network with what a resumed run could lose, batch statistics and dropout, and with time to be killed in."""

import time
from pathlib import Path

from torch import nn

HOLD = "hold"
"""While a file of this name lies in the working directory, training waits at its eleventh update."""
SLOW = "slow"
"""While a file of this name lies there, an update takes 20 ms, so that most of a run is training."""


class _Patience(nn.Module):
    def __init__(self):
        super().__init__()
        self.updates = 0

    def forward(self, x):
        if self.training:
            self.updates += 1
            time.sleep(0.02 if Path(SLOW).exists() else 0)
            while self.updates > 10 and Path(HOLD).exists():
                time.sleep(0.005)
        return x


def network(input_shape, n_classes):
    pixels = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 64),
        nn.BatchNorm1d(64),
        _Patience(),
        nn.Dropout(0.2),
        nn.ReLU(),
        nn.Linear(64, n_classes),
    )
