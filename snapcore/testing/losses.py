"""What a backend's loss has to be, in NumPy and float64, from the model's outputs and the targets."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from snapcore.data import TrainingData


def expected_loss(data: TrainingData, outputs: NDArray[Any], rows: NDArray[np.integer[Any]]) -> float:
    """Return the loss that the data name of some of the examples, the mean over all that counts.

    Arguments:
        data: where the targets are.
        outputs: of the model for these examples, [rows, …, n_outputs].
        rows: which examples they are.
    """
    outputs, y = outputs.astype(np.float64), data.y[rows]
    if data.kind == "classes":
        counts = np.full(y.shape, True) if data.ignore is None else y != data.ignore
        logits, classes = outputs[counts], y[counts]
        return float(np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(classes)), classes]))
    y = y.reshape(*outputs.shape[:-1], data.n_classes)
    if data.kind == "labels":
        return float(np.mean(np.log1p(np.exp(np.where(y == 1, -outputs, outputs)))))
    if data.kind == "values":
        return float(np.mean((outputs - y) ** 2))
    mean, variance = outputs[..., : data.n_classes], np.exp(outputs[..., data.n_classes :])
    density = np.exp(-((y - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    return float(np.mean(-np.log(density)))
