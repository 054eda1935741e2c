"""The losses of managed runs, against distributions of SciPy's; what does not count, and shapes that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats
from scipy.special import log_softmax

from snapcore import CosineCycles, DataError, Program
from snapcore.data import TrainingData
from snapcore_jax.backend import JaxBackend
from snapcore_jax.losses import make_loss

BACKEND = JaxBackend()
PLAN = Program("test", CosineCycles(lr=0.05, steps=24, cycles=3))
SHAPES = [(6,), (6, 5), (6, 4, 5)]
IGNORED = -100


def silent(step, loss):
    pass


def random():
    return np.random.default_rng(0)


def log_likelihood(logits, y):
    return np.take_along_axis(log_softmax(logits, -1), y[..., None], -1)[..., 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_of_the_classes_on_the_last_axis(shape):
    logits, y = random().normal(size=(*shape, 3)), random().integers(0, 3, shape)
    assert make_loss("cross-entropy")(logits, y) == pytest.approx(-log_likelihood(logits, y).mean(), rel=1e-5)


@pytest.mark.parametrize("ignored", [IGNORED, 255, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_ignored_counts_neither_in_the_loss_nor_in_its_mean(shape, ignored):
    logits, y = random().normal(size=(*shape, 3)), random().integers(0, 3, shape)
    y[0], y[1:3] = ignored, 2
    loss, gradient = jax.value_and_grad(make_loss("cross-entropy", ignored))(jnp.array(logits), y)
    counts = y != ignored
    assert loss == pytest.approx(-log_likelihood(logits[counts], y[counts]).mean(), rel=1e-5)
    assert not gradient[~counts].any()
    assert gradient[counts].all()


def test_where_nothing_counts_the_loss_and_its_gradient_are_zero():
    given = jnp.array(random().normal(size=(4, 5, 3))), np.full((4, 5), IGNORED)
    loss, gradient = jax.value_and_grad(make_loss("cross-entropy", IGNORED))(*given)
    assert loss == 0
    assert not gradient.any()
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3])
def test_the_other_losses_are_negative_log_likelihoods(shape, n):
    draw = random()
    outputs, values, logs = draw.normal(size=(3, *shape, n))
    labels = draw.integers(0, 2, (*shape, n)).astype(np.float32)
    likely = np.where(labels == 1, outputs, -outputs)
    assert make_loss("binary-cross-entropy")(np.float32(outputs), labels) == pytest.approx(
        -stats.logistic.logcdf(likely).mean()
    )
    assert make_loss("squared-error")(*map(np.float32, (outputs, values))) == pytest.approx(
        ((outputs - values) ** 2).mean()
    )
    normal = -stats.norm.logpdf(values, outputs, np.exp(3 * logs / 2)).mean()
    both = np.concatenate([outputs, 3 * logs], -1)
    assert make_loss("gaussian-nll")(*map(np.float32, (both, values))) == pytest.approx(normal, rel=1e-5)


def test_losses_that_are_equal_are_equal_so_that_an_update_is_compiled_once():
    assert make_loss("cross-entropy", 255) == make_loss("cross-entropy", 255) != make_loss("cross-entropy", 1)
    assert hash(make_loss("gaussian-nll")) == hash(make_loss("gaussian-nll"))


# ------------------------------------------------------------------------------------------------ whole runs


def vectors(loss, y, n):
    x = random().normal(size=(len(y), 1, 8, 8)).astype(np.float32)
    return TrainingData(x, y, n, 5, loss=loss)


def dense(y):
    return TrainingData(random().normal(size=(len(y), 2, 5, 7)).astype(np.float32), y, 3, 4, ignore=IGNORED)


@pytest.mark.parametrize("loss", ["squared-error", "gaussian-nll"])
def test_a_value_an_example_meets_its_own_output_and_no_others(loss):
    """[batch] against [batch, 1] would be compared as [batch, batch]: a loss like any other, and nothing learnt."""
    y, reports = np.linspace(-3, 3, 10), []
    for targets in (y, y[:, None], y.astype(np.float32)):
        data = vectors(loss, targets, 1)
        state = BACKEND.init("mlp", data, PLAN, seed=3)
        (rows,) = data.indices(0, 1)
        outputs = BACKEND.logits(state, data.x[rows])
        expected = ((outputs[:, 0] - y[rows]) ** 2).mean()
        if loss == "gaussian-nll":
            expected = -stats.norm.logpdf(y[rows], outputs[:, 0], np.exp(outputs[:, 1] / 2)).mean()
        BACKEND.train(state, 0, 1, report=lambda step, found: reports.append(found))
        assert reports[-1] == pytest.approx(expected, rel=1e-5)
    assert len(set(reports)) == 1


def test_the_fully_convolutional_network_learns_which_class_each_pixel_has():
    """Whether a pixel is below or above its neighbours' mean, and 255 where it is near."""
    x = random().normal(size=(64, 1, 6, 9)).astype(np.float32)
    padded = np.pad(x[:, 0], ((0, 0), (1, 1), (1, 1)))
    off = x[:, 0] - sum(padded[:, i : i + 6, j : j + 9] for i in range(3) for j in range(3)) / 9
    y = np.where(np.abs(off) < 0.1, 255, off > 0)
    state = BACKEND.init("fcn", TrainingData(x, y, 2, 16, ignore=255), PLAN, seed=3)
    outputs = BACKEND.logits(BACKEND.train(state, 0, 24, report=silent), x)
    assert outputs.shape == (64, 6, 9, 2)
    counts = y != 255
    assert (outputs.argmax(-1)[counts] == y[counts]).mean() > 0.9


def test_a_batch_in_which_nothing_counts_moves_nothing():
    y = random().integers(0, 3, (8, 5, 7))
    data, losses = dense(y), []
    y[data.indices(0, 1)[0]] = IGNORED
    state = BACKEND.init(channels_last, data, PLAN, seed=3, weight_decay=0.0)
    before = [np.array(each) for each in jax.tree.leaves(state.training.params)]
    state = BACKEND.train(state, 0, 1, report=lambda step, loss: losses.append(loss))
    assert losses == [0.0]
    assert all(map(np.array_equal, before, jax.tree.leaves(state.training.params)))


# ------------------------------------------------------------------------------------------------ refused


def channels_last(input_shape, n_outputs, rngs):
    layer = nnx.Conv(input_shape[0], n_outputs, (3, 3), rngs=rngs)
    return nnx.Sequential(lambda x: jnp.moveaxis(x, 1, -1), layer)


def channels_first(input_shape, n_outputs, rngs):
    return nnx.Sequential(channels_last(input_shape, n_outputs, rngs), lambda x: jnp.moveaxis(x, -1, 1))


def flat(input_shape, n_outputs, rngs):
    return nnx.Sequential(lambda x: x.reshape(len(x), -1), nnx.Linear(64, 1, rngs=rngs), lambda x: x[:, 0])


def test_outputs_with_the_channels_first_are_refused_before_the_first_update():
    shapes = r"must return \[batch, 5, 7, 3\] for loss='cross-entropy' and y of .*, got \[batch, 3, 5, 7\]"
    with pytest.raises(DataError, match=rf"{shapes}: move its axis 1 to the end, as permute\(0, 2, 3, 1\) does"):
        BACKEND.init(channels_first, dense(np.zeros((4, 5, 7), int)), PLAN, seed=0)


def test_outputs_without_an_axis_for_the_values_are_refused():
    with pytest.raises(DataError, match=r"must return \[batch, 1\] .*got \[batch\]: build it with the number of"):
        BACKEND.init(flat, vectors("squared-error", np.zeros(8), 1), PLAN, seed=0)


def test_a_model_that_returns_more_than_an_array_is_refused():
    def two(input_shape, n_outputs, rngs):
        return nnx.Sequential(flat(input_shape, n_outputs, rngs), lambda x: (x, x))

    with pytest.raises(DataError, match="must return one array, got tuple: return its outputs alone"):
        BACKEND.init(two, vectors("squared-error", np.zeros(8), 1), PLAN, seed=0)
