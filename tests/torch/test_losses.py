"""The losses of managed runs, against distributions of PyTorch's; what does not count, and shapes that do not fit."""

import math

import numpy as np
import pytest
import torch
from torch import distributions, nn

from snapcore import CosineCycles, DataError, Program
from snapcore.backend import resolved
from snapcore.data import TrainingData
from snapcore_torch.backend import TorchBackend
from snapcore_torch.losses import make_loss

BACKEND = TorchBackend()
PLAN = Program("test", CosineCycles(lr=0.05, steps=24, cycles=3))
SHAPES = [(6,), (6, 5), (6, 4, 5)]
IGNORED = -100


def silent(step, loss):
    pass


def begin(data, model, **options):
    return BACKEND.init(model, data, PLAN, seed=3, device="cpu", **options)


def pixelwise(input_shape, n_outputs):
    """Without batch statistics, so that parts of a batch can be compared with the whole."""
    return nn.Sequential(nn.Conv2d(input_shape[0], 8, 3, padding=1), nn.Tanh(), ToTheEnd(), nn.Linear(8, n_outputs))


class ToTheEnd(nn.Module):
    def forward(self, images):
        return images.permute(0, 2, 3, 1)


def dense(n_ignored=4):
    """Twelve images in batches of six; of the first, no pixel counts."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, (12, 5, 7))
    y[:n_ignored] = IGNORED
    y[:, 0] = IGNORED
    x = random.normal(size=(12, 2, 5, 7)).astype(np.float32)
    return TrainingData(x, y, 3, 6, seed=1, ignore=IGNORED)


def vectors(loss, y, n, batch_size=5):
    x = np.random.default_rng(1).normal(size=(len(y), 1, 8, 8)).astype(np.float32)
    return TrainingData(x, y, n, batch_size, loss=loss)


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_of_the_classes_on_the_last_axis(shape):
    logits, y = torch.randn(*shape, 3), torch.randint(3, shape)
    expected = -distributions.Categorical(logits=logits).log_prob(y).mean()
    torch.testing.assert_close(make_loss("cross-entropy")(logits, y), expected)


@pytest.mark.parametrize("ignored", [IGNORED, 255, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_ignored_counts_neither_in_the_loss_nor_in_its_mean(shape, ignored):
    logits, y = torch.randn(*shape, 3, requires_grad=True), torch.randint(3, shape)
    y[0], y[1:3] = ignored, 2
    loss = make_loss("cross-entropy", ignored)(logits, y)
    counts = y != ignored
    torch.testing.assert_close(loss, -distributions.Categorical(logits=logits[counts]).log_prob(y[counts]).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[~counts].any()
    assert gradient[counts].all()


def test_where_nothing_counts_the_loss_and_its_gradient_are_zero():
    logits = torch.randn(4, 5, 3, requires_grad=True)
    loss = make_loss("cross-entropy", IGNORED)(logits, torch.full((4, 5), IGNORED))
    assert loss == 0
    assert torch.equal(*torch.autograd.grad(loss, logits), torch.zeros(4, 5, 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3])
def test_the_other_losses_are_negative_log_likelihoods(shape, n):
    outputs, values, labels = torch.randn(*shape, n), torch.randn(*shape, n), torch.randint(2, (*shape, n)).float()
    bernoulli = -distributions.Bernoulli(logits=outputs).log_prob(labels).mean()
    torch.testing.assert_close(make_loss("binary-cross-entropy")(outputs, labels), bernoulli)
    unit = -distributions.Normal(outputs, 1.0).log_prob(values).mean()
    torch.testing.assert_close(make_loss("squared-error")(outputs, values), 2 * unit - math.log(2 * math.pi))
    logs = 3 * torch.randn(*shape, n)
    normal = -distributions.Normal(outputs, logs.exp().sqrt()).log_prob(values).mean()
    torch.testing.assert_close(make_loss("gaussian-nll")(torch.cat([outputs, logs], -1), values), normal)


def test_a_variance_far_below_one_millionth_is_taken_as_it_is():
    """PyTorch's own gaussian loss would bound it."""
    outputs = torch.tensor([[0.0, -30.0]], requires_grad=True)
    loss = make_loss("gaussian-nll")(outputs, torch.zeros(1, 1))
    assert loss.item() == pytest.approx((math.log(2 * math.pi) - 30) / 2)
    assert torch.autograd.grad(loss, outputs)[0].tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("loss", ["binary-cross-entropy", "squared-error", "gaussian-nll"])
def test_outputs_in_half_precision_are_compared_in_float32(loss):
    outputs = torch.randn(6, 2)
    y = torch.full((6, 1 if loss == "gaussian-nll" else 2), 1.0)
    found = make_loss(loss)(outputs.bfloat16(), y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, make_loss(loss)(outputs.bfloat16().float(), y))


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(("loss", "per_value"), [("squared-error", 1), ("gaussian-nll", 2)])
def test_a_value_an_example_meets_its_own_output_and_no_others(loss, per_value):
    """[batch] against [batch, 1] would be compared as [batch, batch]: a loss like any other, and nothing learnt."""
    y, reports = np.linspace(-3, 3, 10), []
    for targets in (y, y[:, None], y.astype(np.float32)):
        data = vectors(loss, targets, 1)
        state = begin(data, "mlp")
        (rows,) = data.indices(0, 1)
        outputs = torch.from_numpy(BACKEND.logits(state, data.x[rows]))
        assert outputs.shape == (5, per_value)
        mean, variance = outputs[:, 0], outputs[:, 1].exp() if per_value == 2 else torch.ones(5)
        expected = -distributions.Normal(mean, variance.sqrt()).log_prob(torch.tensor(y[rows])).mean()
        if loss == "squared-error":
            expected = 2 * expected - math.log(2 * math.pi)
        BACKEND.train(state, 0, 1, report=lambda step, found: reports.append(found))
        assert reports[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert len(set(reports)) == 1


@pytest.mark.parametrize("parts", [2, 6])
def test_micro_batches_in_which_nothing_counts_give_the_update_of_the_whole_batch(parts):
    data, losses = dense(), {1: [], parts: []}
    states = [begin(data, pixelwise, accumulate=k) for k in losses]
    counting = [(data.y[some] != IGNORED).any() for some in np.array_split(data.indices(0, 1)[0], parts)]
    assert all(counting) == (parts == 2)
    for k, state in zip(losses, states, strict=True):
        BACKEND.train(state, 0, 8, report=lambda step, loss, k=k: losses[k].append(loss))
    assert losses[parts] == pytest.approx(losses[1], abs=1e-5)
    whole, split = (resolved(BACKEND.capture(state)) for state in states)
    for name, array in whole.items():
        np.testing.assert_allclose(split[name], array, atol=1e-6, err_msg=name)


def test_a_batch_in_which_nothing_counts_moves_nothing():
    data = dense()
    rows = data.indices(0, 1)[0]
    data.y[rows] = IGNORED
    state, losses = begin(data, pixelwise, weight_decay=0.0), []
    before = {name: array.copy() for name, array in resolved(BACKEND.capture(state)).items()}
    after = resolved(BACKEND.capture(BACKEND.train(state, 0, 1, report=lambda step, loss: losses.append(loss))))
    assert losses == [0.0]
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_fully_convolutional_network_learns_which_class_each_pixel_has():
    """Whether a pixel is below or above its neighbours' mean, and 255 where it is near."""
    random = np.random.default_rng(3)
    x = random.normal(size=(64, 1, 6, 9)).astype(np.float32)
    padded = np.pad(x[:, 0], ((0, 0), (1, 1), (1, 1)))
    near = sum(padded[:, i : i + 6, j : j + 9] for i in range(3) for j in range(3)) / 9
    off = x[:, 0] - near
    y = np.where(np.abs(off) < 0.1, 255, off > 0)
    data = TrainingData(x, y, 2, 16, ignore=255)
    state = BACKEND.train(begin(data, "fcn"), 0, 24, report=silent)
    outputs = BACKEND.logits(state, x)
    assert outputs.shape == (64, 6, 9, 2)
    counts = y != 255
    assert (outputs.argmax(-1)[counts] == y[counts]).mean() > 0.9


# ------------------------------------------------------------------------------------------------ refused


def channels_first(input_shape, n_outputs):
    return nn.Conv2d(input_shape[0], n_outputs, 3, padding=1)


def test_outputs_with_the_channels_first_are_refused_before_the_first_update():
    asked = (
        r"must return \[batch, 5, 7, 3\] for loss='cross-entropy' and y of shape \(12, 5, 7\), got \[batch, 3, 5, 7\]"
    )
    with pytest.raises(DataError, match=rf"{asked}: move its axis 1 to the end, as permute\(0, 2, 3, 1\) does"):
        begin(dense(), channels_first)


@pytest.mark.parametrize(
    ("loss", "y", "n", "model", "got"),
    [
        ("squared-error", np.zeros(9), 1, lambda shape, n: nn.Sequential(nn.Flatten(), nn.Linear(64, n + 1)), "2"),
        ("gaussian-nll", np.zeros(9), 1, lambda shape, n: nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), "1"),
        ("squared-error", np.zeros(9), 1, lambda shape, n: nn.Sequential(nn.Flatten(), nn.Linear(64, 1), Flat()), ""),
        ("binary-cross-entropy", np.zeros((9, 2)), 2, lambda shape, n: ToTheEnd(), "8, 8, 1"),
    ],
)
def test_outputs_of_another_shape_are_refused_with_both_shapes(loss, y, n, model, got):
    with pytest.raises(DataError, match=rf"got \[batch{', ' if got else ''}{got}\]: build it with the number of out"):
        begin(vectors(loss, y, n), model)


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten()[: len(x)]


class Two(nn.Module):
    def forward(self, x):
        return x, x


def test_a_model_that_returns_more_than_a_tensor_is_refused():
    with pytest.raises(DataError, match="must return one tensor, got tuple: return its outputs alone"):
        begin(dense(), lambda shape, n: Two())


def test_looking_at_the_outputs_shape_changes_nothing():
    class Noting(nn.Module):
        def __init__(self, input_shape, n_outputs):
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), pixelwise(input_shape, n_outputs))
            self.calls = 0

        def forward(self, x):
            assert not self.training
            assert not torch.is_grad_enabled()
            self.calls += 1
            torch.rand(())
            return self.layers(x)

    torch.manual_seed(5)
    due = torch.rand(())
    torch.manual_seed(5)
    state = begin(dense(), Noting)
    assert torch.rand(()) == due
    assert (state.model.calls, state.model.training) == (1, True)
    assert state.model.layers[0].num_batches_tracked == 0
