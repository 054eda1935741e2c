"""What an ensemble of each kind has to give, in NumPy and float64, by the core's own recipes of kept predictions."""

import numpy as np
from scipy import special

from snapcore.ensemble import Predictions, Recipe

WEIGHTS = (0.5, 0.0, 0.2, 0.3)
KINDS = {"softmax": "classes", "sigmoid": "labels", "identity": "values", "gaussian": "gaussian"}
"""By activation."""


def recipe_of(activation):
    """Weights, and where there are probabilities a temperature."""
    return Recipe(WEIGHTS, temperature=2.5 if activation in ("softmax", "sigmoid") else 1.0)


def members_of(activation, outputs):
    """Each member's probabilities, values, or means and variances, of outputs [members, …, outputs]."""
    outputs = np.asarray(outputs, np.float64)
    if activation == "gaussian":
        mean, log_variance = np.split(outputs, 2, -1)
        pairs = np.stack([mean, np.exp(log_variance)], -1)
        return pairs[..., 0, :] if pairs.shape[-2] == 1 else pairs
    return {"softmax": lambda o: special.softmax(o, -1), "sigmoid": special.expit}.get(activation, np.array)(outputs)


def pooled_of(activation, outputs, recipe=None):
    """The members' prediction together."""
    found = members_of(activation, outputs)
    given = np.log(found) if activation in ("softmax", "sigmoid") else found
    pooled = (recipe or Recipe((1,) * len(found))).apply(Predictions(given, kind=KINDS[activation]))
    return np.exp(pooled) if activation in ("softmax", "sigmoid") else pooled
