"""The native loop does what a hand would have written, update for update and bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from snapcore import CosineCycles, DataError
from snapcore.data import TrainingData
from snapcore_torch.batches import CHUNK, DeviceFeed, LoaderFeed
from snapcore_torch.models import MODELS, cnn, mlp
from snapcore_torch.options import UpdateOptions
from snapcore_torch.schedule import GroupRates
from snapcore_torch.training import Loop

CPU = torch.device("cpu")
CYCLES = CosineCycles(lr=0.05, steps=120, cycles=3)


def loop_over(feed, model=None, **options):
    torch.manual_seed(7)
    model = model or cnn((1, 8, 8), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return Loop(model, optimizer, feed, CYCLES, GroupRates(optimizer), **options)


def silent(step, loss):
    pass


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def by_hand(data, updates):
    """An ordinary loop, with the paper's equation 2 for the rate."""
    torch.manual_seed(7)
    model = cnn((1, 8, 8), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    losses = []
    for step in range(updates):
        rate = 0.05 / 2 * (np.cos(np.pi * (step % 40) / 40) + 1)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        rows = data.indices(step, step + 1)[0]
        x, y = torch.tensor(data.x[rows]), torch.tensor(data.y[rows])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.state_dict(), losses


def test_the_loop_is_bit_for_bit_the_one_written_by_hand(digits):
    reports = []
    loop = loop_over(DeviceFeed(digits, CPU))
    loop.run(0, 60, lambda *report: reports.append(report))
    weights, losses = by_hand(digits, 60)
    assert same(loop.model.state_dict(), weights)
    assert reports == list(enumerate(losses, 1))


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("cut", [1, 17, CHUNK, 59])
def test_a_stretch_in_two_parts_is_the_stretch_in_one(digits, cut):
    whole, parts = loop_over(DeviceFeed(digits, CPU)), loop_over(DeviceFeed(digits, CPU))
    whole.run(0, 60, silent)
    parts.run(0, cut, silent)
    parts.run(cut, 60, silent)
    assert same(whole.model.state_dict(), parts.model.state_dict())
    assert all(
        torch.equal(whole.optimizer.state[a]["momentum_buffer"], parts.optimizer.state[b]["momentum_buffer"])
        for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    )


def test_every_update_is_reported_once_and_in_order(digits):
    steps = []
    loop = loop_over(DeviceFeed(digits, CPU), mlp((1, 8, 8), 10))
    for start, stop in ((0, 3), (3, 3), (3, 2 * CHUNK + 5)):
        loop.run(start, stop, lambda step, _: steps.append(step))
    assert steps == list(range(1, 2 * CHUNK + 6))


def test_the_loop_trains_in_training_mode_whatever_came_before(digits):
    loop = loop_over(DeviceFeed(digits, CPU))
    loop.model.eval()
    loop.run(0, 2, silent)
    assert loop.model.training
    assert loop.model.state_dict()["0.1.num_batches_tracked"] == 2


def test_groups_keep_their_ratio_in_the_loop(digits):
    model = mlp((1, 8, 8), 10)
    first, last = model[1], model[5]
    optimizer = torch.optim.SGD([{"params": first.parameters()}, {"params": last.parameters(), "lr": 0.005}], lr=0.05)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    Loop(model, optimizer, DeviceFeed(digits, CPU), CYCLES, GroupRates(optimizer)).run(38, 42, silent)
    assert rates == [[CYCLES(step), CYCLES(step) * (0.005 / 0.05)] for step in range(38, 42)]


def test_bfloat16_computes_narrow_and_keeps_wide_weights(digits):
    widths = set()

    def loss(outputs, labels):
        widths.add(outputs.dtype)
        return nn.functional.cross_entropy(outputs, labels)

    loop = loop_over(
        DeviceFeed(digits, CPU), mlp((1, 8, 8), 10), loss=loss, options=UpdateOptions(precision="bfloat16")
    )
    losses = []
    loop.run(0, 60, lambda _, value: losses.append(value))
    assert widths == {torch.bfloat16}
    assert {parameter.dtype for parameter in loop.model.parameters()} == {torch.float32}
    assert np.mean(losses[-10:]) < losses[0]


def test_labels_of_any_integer_type_train_alike(digits):
    weights = []
    for dtype in (np.uint8, np.int32, np.int64):
        data = TrainingData(digits.x, digits.y.astype(dtype), 10, 50, seed=3)
        loop = loop_over(DeviceFeed(data, CPU))
        loop.run(0, 3, silent)
        weights.append(loop.model.state_dict())
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


def test_read_only_examples_are_taken_without_a_warning_and_left_alone(digits):
    x = digits.x.copy()
    x.flags.writeable = False
    loop = loop_over(DeviceFeed(TrainingData(x, digits.y, 10, 50, seed=3), CPU))
    loop.run(0, 3, silent)
    assert np.array_equal(x, digits.x)


def test_a_data_loader_is_walked_epoch_after_epoch(digits):
    x, y = torch.tensor(digits.x[:20]), torch.tensor(digits.y[:20])
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    feed = LoaderFeed(loader, CPU)
    seen = [*feed.batches(0, 2), *feed.batches(2, 7)]
    starts = [(0, 8), (8, 16), (16, 20)] * 2 + [(0, 8)]
    for (batch, labels), (begin, end) in zip(seen, starts, strict=True):
        assert torch.equal(batch, x[begin:end])
        assert torch.equal(labels, y[begin:end])


def test_the_same_batches_train_the_same_model_from_memory_and_from_a_loader(digits):
    class Batches:
        def __iter__(self):
            for rows in digits.indices(0, 20):
                yield torch.tensor(digits.x[rows]), torch.tensor(digits.y[rows])

    memory, loader = loop_over(DeviceFeed(digits, CPU)), loop_over(LoaderFeed(Batches(), CPU))
    memory.run(0, 20, silent)
    loader.run(0, 20, silent)
    assert same(memory.model.state_dict(), loader.model.state_dict())


@pytest.mark.parametrize("loader", [[], iter([])])
def test_a_loader_without_batches_is_refused(loader):
    loop = loop_over(LoaderFeed(loader, CPU))
    with pytest.raises(DataError, match="the loader gave no batch"):
        loop.run(0, 1, silent)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 11)])
def test_the_fully_convolutional_network_gives_logits_for_each_pixel_and_looks_eleven_pixels_wide(shape):
    model = MODELS["fcn"](shape, 6).eval()
    convolutions = 9 * shape[0] * 32 + 4 * 9 * 32 * 32 + 5 * 2 * 32
    assert sum(each.numel() for each in model.parameters()) == convolutions + 32 * 6 + 6
    x = torch.randn(2, *shape, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, *shape[1:], 6)
    (seen,) = torch.autograd.grad(logits[1, 0, 0].sum(), x)
    assert not seen[0].any()
    assert seen[1, :, :6, :6].any()
    assert not seen[1, :, 6:].any()
    assert not seen[1, :, :, 6:].any()


@pytest.mark.parametrize("shape", [(64,), (8, 8)])
def test_the_fully_convolutional_network_refuses_what_is_no_image(shape):
    with pytest.raises(DataError, match=r"fcn needs examples of \(channels, height, width\), got"):
        MODELS["fcn"](shape, 6)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 11)])
def test_a_built_in_model_takes_images_of_any_shape_and_gives_a_logit_per_class(name, shape):
    logits = MODELS[name](shape, 6)(torch.randn(4, *shape))
    assert logits.shape == (4, 6)
    assert bool((logits < 0).any())
