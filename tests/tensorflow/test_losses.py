"""The losses of managed runs, against distributions of SciPy's; what does not count, and shapes that do not fit."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy import stats
from scipy.special import log_softmax

from snapcore import CosineCycles, DataError, Program
from snapcore.data import TrainingData
from snapcore_tensorflow.backend import TensorFlowBackend
from snapcore_tensorflow.losses import Loss

BACKEND = TensorFlowBackend()
PLAN = Program("test", CosineCycles(lr=0.05, steps=24, cycles=3))
SHAPES = [(6,), (6, 5), (6, 4, 5)]
IGNORED = -100


def random():
    return np.random.default_rng(0)


def found(loss, outputs, targets, ignore=None, parts=1):
    """The sum of the shares of equal parts."""
    pairs = zip(np.split(np.float32(outputs), parts), np.split(targets, parts), strict=True)
    shares = [Loss(loss, ignore).share(*map(tf.constant, pair), tf.constant(targets)) for pair in pairs]
    return float(tf.add_n(shares))


@pytest.mark.parametrize("ignored", [None, IGNORED, 255, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", [1, 3])
def test_cross_entropy_is_the_mean_over_what_is_not_ignored_in_the_whole_batch(shape, ignored, parts):
    """Of three parts the first counts for nothing."""
    logits, y = random().normal(size=(*shape, 3)), random().integers(0, 3, shape)
    if ignored is not None:
        y[:2], y[2:3] = ignored, 2
    counts = np.full(shape, True) if ignored is None else y != ignored
    likelihood = np.take_along_axis(log_softmax(logits[counts], -1), y[counts][:, None], -1)
    assert found("cross-entropy", logits, y, ignored, parts) == pytest.approx(-likelihood.mean(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3])
def test_the_other_losses_are_negative_log_likelihoods(shape, n):
    draw = random()
    outputs, values, logs = draw.normal(size=(3, *shape, n)).astype(np.float32)
    labels = draw.integers(0, 2, (*shape, n)).astype(np.float32)
    bernoulli = -stats.logistic.logcdf(np.where(labels == 1, outputs, -outputs)).mean()
    normal = -stats.norm.logpdf(values, outputs, np.exp(3 * logs / 2)).mean()
    both = np.concatenate([outputs, 3 * logs], -1)
    for parts in (1, 2):
        assert found("binary-cross-entropy", outputs, labels, parts=parts) == pytest.approx(bernoulli, rel=1e-5)
        assert found("squared-error", outputs, values, parts=parts) == pytest.approx(((outputs - values) ** 2).mean())
        assert found("gaussian-nll", both, values, parts=parts) == pytest.approx(normal, rel=1e-5)


# ------------------------------------------------------------------------------------------------ whole runs


def vectors(loss, y, n):
    return TrainingData(random().normal(size=(len(y), 1, 8, 8)).astype(np.float32), y, n, 5, loss=loss)


def dense(y):
    return TrainingData(random().normal(size=(len(y), 2, 5, 7)).astype(np.float32), y, 3, 4, ignore=IGNORED)


@pytest.mark.parametrize("loss", ["squared-error", "gaussian-nll"])
def test_a_value_an_example_meets_its_own_output_and_no_others(loss):
    """[batch] against [batch, 1] would be compared as [batch, batch]: a loss like any other, and nothing learnt."""
    y, reports = np.linspace(-3, 3, 10), []
    for targets in (y, y[:, None]):
        data = vectors(loss, targets, 1)
        state = BACKEND.init("mlp", data, PLAN, seed=3)
        (rows,) = data.indices(0, 1)
        outputs = BACKEND.logits(state, data.x[rows])
        expected = ((outputs[:, 0] - y[rows]) ** 2).mean()
        if loss == "gaussian-nll":
            expected = -stats.norm.logpdf(y[rows], outputs[:, 0], np.exp(outputs[:, 1] / 2)).mean()
        BACKEND.train(state, 0, 1, report=lambda step, found: reports.append(found))
        assert reports[-1] == pytest.approx(expected, rel=1e-5)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("xla", [False, True])
def test_a_batch_in_which_nothing_counts_moves_nothing_and_the_next_one_does(xla):
    y = random().integers(0, 3, (8, 5, 7))
    data, losses = dense(y), []
    y[data.indices(0, 1)[0]] = IGNORED
    state = BACKEND.init(channels_last, data, PLAN, seed=3, weight_decay=0.0, xla=xla)
    before = state.model.get_weights()
    BACKEND.train(state, 0, 1, report=lambda step, loss: losses.append(loss))
    assert losses == [0.0]
    assert all(map(np.array_equal, before, state.model.get_weights()))
    BACKEND.train(state, 1, 2, report=lambda step, loss: losses.append(loss))
    assert losses[1] > 0
    assert not any(map(np.array_equal, before, state.model.get_weights()))


def test_the_fully_convolutional_network_learns_which_class_each_pixel_has():
    """Whether a pixel is below or above its neighbours' mean, and 255 where it is near."""
    x = random().normal(size=(64, 1, 6, 9)).astype(np.float32)
    padded = np.pad(x[:, 0], ((0, 0), (1, 1), (1, 1)))
    off = x[:, 0] - sum(padded[:, i : i + 6, j : j + 9] for i in range(3) for j in range(3)) / 9
    y = np.where(np.abs(off) < 0.1, 255, off > 0)
    state = BACKEND.init("fcn", TrainingData(x, y, 2, 16, ignore=255), PLAN, seed=3)
    outputs = BACKEND.logits(BACKEND.train(state, 0, 24, report=lambda step, loss: None), x)
    assert outputs.shape == (64, 6, 9, 2)
    counts = y != 255
    assert (outputs.argmax(-1)[counts] == y[counts]).mean() > 0.9


# ------------------------------------------------------------------------------------------------ refused


def channels_last(input_shape, n_outputs):
    convolution = layers.Conv2D(n_outputs, 3, padding="same", data_format="channels_last")
    return keras.Sequential([keras.Input(input_shape), layers.Permute((2, 3, 1)), convolution])


def channels_first(input_shape, n_outputs):
    return keras.Sequential([channels_last(input_shape, n_outputs), layers.Permute((3, 1, 2))])


def test_outputs_with_the_channels_first_are_refused_before_the_first_update():
    shapes = r"must return \[batch, 5, 7, 3\] for loss='cross-entropy' and y of .*, got \[batch, 3, 5, 7\]"
    with pytest.raises(DataError, match=rf"{shapes}: move its axis 1 to the end, as permute\(0, 2, 3, 1\) does"):
        BACKEND.init(channels_first, dense(np.zeros((4, 5, 7), int)), PLAN, seed=0)
