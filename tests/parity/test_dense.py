"""The fully convolutional network gives the same in every framework, pixel by pixel, and has the same losses."""

import functools

import numpy as np
import pytest

from snapcore import CosineCycles, Program
from snapcore.backend import load_backend
from snapcore.data import TrainingData

from . import oracle

WIDTHS, CLASSES, IGNORED = (2, 32, 32, 32, 32, 32), 3, 255
PLAN = Program("test", CosineCycles(0.05, 64, 1))
OPTIONS = {"torch": {"device": "cpu"}, "keras": {"velocity": "gradients"}}
NORM = ("scale", "shift", "mean", "variance")


@functools.cache
def data():
    random = np.random.default_rng(0)
    y = random.integers(0, CLASSES, (24, 5, 7))
    y[random.random(y.shape) < 0.3] = IGNORED
    return TrainingData(random.normal(size=(24, 2, 5, 7)).astype(np.float32), y, CLASSES, 8, seed=1, ignore=IGNORED)


def weights():
    """By the oracle's names, in the order in which Keras has them."""
    random, drawn = np.random.default_rng(1), {}
    for k in range(1, 6):
        before, after = WIDTHS[k - 1 : k + 1]
        drawn[f"conv{k}/kernel"] = random.normal(0, (2 / 9 / before) ** 0.5, (3, 3, before, after))
        drawn |= {f"norm{k}/{part}": random.uniform(0.5, 1.5, after) for part in NORM}
    return drawn | {"dense1/kernel": random.normal(0, 0.3, (32, CLASSES)), "dense1/bias": random.normal(size=CLASSES)}


def own_names(framework, captured):
    """A framework's names of the same, in the same order."""
    if framework == "torch":
        norm = ("weight", "bias", "running_mean", "running_var")
        blocks = [f"{k}.{part}" for k in range(5) for part in ("0.weight", *(f"1.{each}" for each in norm))]
        return [*blocks, "6.weight", "6.bias"]
    if framework == "jax":
        norm = [f"norm/{each}" for each in ("scale", "bias", "mean", "var")]
        blocks = [f"blocks/{k}/{part}" for k in range(5) for part in ("convolution/kernel", *norm)]
        return [*blocks, "output/kernel", "output/bias"]
    return sorted(captured)


def begun(framework):
    """A backend, and its state with the weights."""
    backend = load_backend(framework)
    state = backend.init("fcn", data(), PLAN, seed=0, **OPTIONS.get(framework, {}))
    captured = dict(backend.capture(state).resolve())
    axes = {2: (1, 0), 4: (3, 2, 0, 1)} if framework == "torch" else {}
    for name, value in zip(own_names(framework, captured), weights().values(), strict=True):
        captured[name] = np.ascontiguousarray(
            value.transpose(axes.get(value.ndim, tuple(range(value.ndim)))), np.float32
        )
    return backend, backend.restore(state, captured, optimizer="reset")


@functools.cache
def losses_of(framework):
    backend, state = begun(framework)
    losses = []
    backend.train(state, 0, 9, report=lambda step, loss: losses.append(loss))
    return losses


def logits(x):
    """By the oracle's layers, in float64."""
    w = weights()
    for k in range(1, 6):
        x, _ = oracle.convolution(f"conv{k}")(w, x, None)
        scale, shift, mean, variance = (w[f"norm{k}/{part}"] for part in NORM)
        x = np.maximum((x - mean) / np.sqrt(variance + oracle.NORM_EPSILON) * scale + shift, 0)
    return x @ w["dense1/kernel"] + w["dense1/bias"]


@pytest.mark.parametrize("framework", ["torch", "jax", "keras", "tensorflow"])
def test_every_pixel_has_the_oracles_logits(framework):
    backend, state = begun(framework)
    expected = logits(np.moveaxis(data().x, 1, -1).astype(np.float64))
    assert expected.shape == (24, 5, 7, CLASSES)
    np.testing.assert_allclose(backend.logits(state, data().x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("framework", ["jax", "keras", "tensorflow"])
def test_losses_are_those_of_pytorch_update_by_update(framework):
    """With a third of the pixels ignored."""
    np.testing.assert_allclose(losses_of(framework), losses_of("torch"), rtol=1e-3)
