"""What is compared: one training job per model, its course, and how far one course is from another."""

import functools
from dataclasses import dataclass

import numpy as np

from snapcore.data import TrainingData
from snapcore.lab.datasets import load_data

from . import oracle

FIRST = 200
"""Updates over which the losses of two trainings are compared one by one."""

ROUNDING = 2.0**-24
"""The most that rounding to float32 moves a number, as a share of it."""

BOUNDS = {
    "rate used": 2e-5,
    "rate of the schedule": 1e-6,
    "loss": 1e-4,
    "loss at its own weights": 1e-4,
    "snapshot steps": 0,
    "weights": 1e-3,
    "batch statistics": 1e-3,
    "members": 1e-3,
    "ensembles": 1e-3,
    "errors": 2,
}
"""How far a framework may be from the oracle, by quantity, see `deviations`."""


@dataclass(frozen=True)
class Job:
    """One training of one model on scikit-learn's digits; 230 is no multiple of 4: cycles of 58, 58, 58 and 56."""

    model: str
    lr: float
    batch_size: int
    seed: int
    steps: int = 230
    cycles: int = 4
    momentum: float = 0.9
    weight_decay: float = 1e-4

    @functools.cached_property
    def data(self):
        digits = load_data("digits")
        return TrainingData(digits.x_train, digits.y_train, digits.n_classes, self.batch_size, self.seed)

    @functools.cached_property
    def test(self):
        digits = load_data("digits")
        return digits.x_test, digits.y_test

    @functools.cached_property
    def initial(self):
        """Weights and statistics, float32; no two alike, so that none can be mistaken for another."""
        draw = np.random.default_rng(self.seed)
        return {name: _drawn(draw, name, shape).astype(np.float32) for name, shape in SHAPES[self.model].items()}


# The seeds are ones for which no unit is so near to a kink that rounding could decide an update, see docs/parity.md.
JOBS = {"mlp": Job("mlp", lr=0.05, batch_size=64, seed=12), "cnn": Job("cnn", lr=0.02, batch_size=8, seed=18)}


def _shapes(channels, widths):
    shapes = {}
    for k in range(1, len(channels)):
        shapes[f"conv{k}/kernel"] = (3, 3, channels[k - 1], channels[k])
        shapes |= {f"norm{k}/{part}": (channels[k],) for part in ("scale", "shift", "mean", "variance")}
    for k in range(1, len(widths)):
        shapes |= {f"dense{k}/kernel": (widths[k - 1], widths[k]), f"dense{k}/bias": (widths[k],)}
    return shapes


# Digits are 8 × 8: after three poolings one pixel is left, so that flattening it has no order that could differ.
SHAPES = {"mlp": _shapes((), (64, 128, 128, 10)), "cnn": _shapes((1, 32, 64, 128), (128, 128, 10))}

DIVIDED_OUT = ("norm1/scale", "norm1/shift", "norm2/scale", "norm2/shift")
"""What, like the convolutions' kernels, the next batch normalisation divides out again."""


def _drawn(draw, name, shape):
    if name.endswith("/kernel"):
        values = draw.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
    else:
        positive = name.endswith(("/scale", "/variance"))
        values = draw.uniform(0.5, 1.5, shape) if positive else draw.normal(0, 0.1, shape)
    return 10 * values if name.startswith("conv") or name in DIVIDED_OUT else values


@dataclass
class Course:
    """How a job went.

    Arguments:
        rates: of every update.
        schedule: the rates that the framework's own schedule names.
        losses: of every update.
        losses_off: of every update, its loss over the oracle's at the weights it began with, less 1.
        steps: the updates done at each snapshot.
        weights: of each snapshot, under the oracle's names.
        members: probabilities of each on the test images, [members, examples, classes].
        ensembles: those of the last m = 1 … M members together, [members, examples, classes].
        errors: how many test images each of those gets wrong.
    """

    rates: np.ndarray
    schedule: np.ndarray
    losses: np.ndarray
    losses_off: np.ndarray
    steps: tuple[int, ...]
    weights: list[dict[str, np.ndarray]]
    members: np.ndarray
    ensembles: np.ndarray
    errors: list[int]


@functools.cache
def expected(job, rule, ddof, noise=None):
    """Return the course that the oracle takes; `noise` seeds a rounding of all weights after every update."""
    network, step, draw = oracle.NETWORKS[job.model](ddof), oracle.RULES[rule], np.random.default_rng(noise)
    weights = {name: value.astype(np.float64) for name, value in job.initial.items()}
    velocity, losses, members, ends = dict.fromkeys(weights, 0.0), [], [], oracle.ends(job.steps, job.cycles)
    rates = np.array([oracle.rate(t, job.lr, job.steps, job.cycles) for t in range(1, job.steps + 1)])
    for done, (lr, batch) in enumerate(zip(rates, job.data.indices(0, job.steps), strict=True), 1):
        x, y = job.data.x[batch].astype(np.float64), job.data.y[batch]
        loss, gradients, statistics = oracle.loss_and_gradients(network, weights, x, y, job.weight_decay)
        losses.append(loss)
        weights |= statistics
        for name, gradient in gradients.items():
            weights[name], velocity[name] = step(weights[name], velocity[name], gradient, lr, job.momentum)
            if noise is not None:
                weights[name] = weights[name] * (1 + ROUNDING * draw.standard_normal(weights[name].shape))
        if done in ends:
            members.append(dict(weights))
    x, y = job.test
    p = np.stack([oracle.softmax(oracle.logits(network, member, x.astype(np.float64))) for member in members])
    ensembles = np.stack([p[-m:].mean(0) for m in range(1, len(p) + 1)])
    errors = [int((each.argmax(-1) != y).sum()) for each in ensembles]
    return Course(rates, rates, np.array(losses), np.zeros(job.steps), ends, members, p, ensembles, errors)


def deviations(course, standard):
    """Return how far `course` is from `standard`, by quantity.

    Rates are compared as shares of the largest, losses relative to the oracle's, a tensor by its largest deviation
    relative to its largest element, probabilities as they are, and errors in examples.
    """
    statistics = {name for name in standard.weights[0] if name.endswith(oracle.STATISTICS)}
    return {
        "rate used": _largest(course.rates - standard.rates) / standard.rates.max(),
        "rate of the schedule": _largest(course.schedule - standard.rates) / standard.rates.max(),
        "loss": _largest(course.losses[:FIRST] / standard.losses[:FIRST] - 1),
        "loss at its own weights": _largest(course.losses_off),
        "snapshot steps": len({*course.steps} ^ {*standard.steps}),
        "weights": _of_tensors(course, standard, standard.weights[0].keys() - statistics),
        **({"batch statistics": _of_tensors(course, standard, statistics)} if statistics else {}),
        "members": _largest(course.members - standard.members),
        "ensembles": _largest(course.ensembles - standard.ensembles),
        "errors": max(abs(ours - theirs) for ours, theirs in zip(course.errors, standard.errors, strict=True)),
    }


def _of_tensors(course, standard, names):
    pairs = ((a[name], b[name]) for a, b in zip(course.weights, standard.weights, strict=True) for name in names)
    return max(_largest(ours - theirs) / _largest(theirs) for ours, theirs in pairs)


def _largest(array):
    return float(np.abs(array).max())
