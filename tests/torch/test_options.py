"""The options of the managed loop, each against a loop written by hand or against doing without it."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from snapcore import CosineCycles, DataError, DivergedError, Program, ProtocolError, program
from snapcore.backend import resolved
from snapcore.data import TrainingData
from snapcore.run import execute
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble, SnapshotRun
from snapcore_torch.backend import TorchBackend
from snapcore_torch.batches import DeviceFeed, LoaderFeed
from snapcore_torch.options import UpdateOptions
from snapcore_torch.schedule import GroupRates
from snapcore_torch.training import Loop

BACKEND = TorchBackend()
CYCLES = CosineCycles(lr=0.05, steps=24, cycles=3)
PLAN = Program("test", CYCLES)
CPU = torch.device("cpu")


def small(input_shape, n_classes):
    """A convolution and dropout; no batch statistics."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 8, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8 * 36, n_classes)
    )


def normalised(input_shape, n_classes):
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, n_classes)
    )


def plain(input_shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, n_classes))


def silent(step, loss):
    pass


def begin(data, model=plain, **options):
    return BACKEND.init(model, data, PLAN, seed=3, device="cpu", **options)


def trained(data, steps=12, model=plain, report=silent, **options):
    return BACKEND.train(begin(data, model, **options), 0, steps, report=report)


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def close(one, other, tolerance):
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], atol=tolerance) for name in one)


def members(directory):
    store = SnapshotStore(directory)
    return [{name: array.copy() for name, array in store.load(taken.index).items()} for taken in store.members]


def by_hand(data, steps, model=plain, after_backward=lambda model: None, after_update=lambda step, model: None):
    """An ordinary loop from the same weights; no dropout."""
    module = weights_of_start = begin(data, model).model
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = CYCLES(step)
        rows = data.indices(step, step + 1)[0]
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(torch.tensor(data.x[rows])), torch.tensor(data.y[rows])).backward()
        after_backward(module)
        optimizer.step()
        after_update(step, module)
    return weights_of_start


# --------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("parts", [2, 5, 7, 50])
def test_micro_batches_give_the_update_of_the_whole_batch(digits, parts):
    """7 does not divide the batch of 50: the smaller parts count for less."""
    losses = {1: [], parts: []}
    whole, split = (
        trained(digits, accumulate=k, report=lambda step, loss, k=k: losses[k].append((step, loss))) for k in losses
    )
    assert close(weights(whole.model), weights(split.model), 1e-6)
    assert [step for step, _ in losses[parts]] == list(range(1, 13))
    assert [loss for _, loss in losses[parts]] == pytest.approx([loss for _, loss in losses[1]], abs=1e-5)


def test_micro_batches_do_not_change_the_order_nor_the_number_of_updates(digits):
    state = begin(digits, accumulate=5)
    updates = []
    state.optimizer.register_step_post_hook(lambda *_: updates.append(state.optimizer.param_groups[0]["lr"]))
    BACKEND.train(state, 0, 12, report=silent)
    assert updates == [CYCLES(step) for step in range(12)]


def test_the_model_sees_a_micro_batch_at_a_time(digits):
    seen = []
    state = begin(digits, accumulate=5)
    state.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    BACKEND.train(state, 0, 2, report=silent)
    assert seen == [10] * 10


# --------------------------------------------------------------------------------------------- clipping


def test_clipping_is_pytorchs_own(digits):
    def clip(model):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    assert same(weights(trained(digits, clip_norm=0.05).model), weights(by_hand(digits, 12, after_backward=clip)))


def test_no_update_is_longer_than_the_rate_times_the_norm(digits):
    state = begin(digits, clip_norm=0.01, momentum=0.0, weight_decay=0.0)
    before = torch.nn.utils.parameters_to_vector(state.model.parameters()).detach().double()
    BACKEND.train(state, 0, 1, report=silent)
    after = torch.nn.utils.parameters_to_vector(state.model.parameters()).detach().double()
    assert torch.linalg.vector_norm(after - before).item() == pytest.approx(0.01 * 0.05, rel=1e-3)


def test_a_norm_never_reached_changes_nothing(digits):
    assert close(weights(trained(digits, clip_norm=1e6).model), weights(trained(digits).model), 0)


# --------------------------------------------------------------------------------------------- memory order


def test_channels_last_is_another_order_in_memory_and_the_same_training(digits):
    rgb = TrainingData(np.repeat(digits.x, 3, axis=1), digits.y, 10, 50, seed=3)
    seen = []
    state = begin(rgb, normalised, channels_last=True)
    state.model[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    BACKEND.train(state, 0, 12, report=silent)
    assert state.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert seen == [True] * 12
    assert close(weights(state.model), weights(trained(rgb, model=normalised).model), 1e-5)


def test_members_of_a_channels_last_run_are_in_the_usual_order(digits, tmp_path):
    rgb = TrainingData(np.repeat(digits.x, 3, axis=1), digits.y, 10, 50, seed=3)
    state = execute(PLAN, BACKEND, model=normalised, data=rgb, directory=tmp_path, device="cpu", channels_last=True)
    (last,) = members(tmp_path)[2:]
    assert same(last, weights(state.model))


def test_channels_last_needs_images(digits):
    flat = TrainingData(digits.x.reshape(1000, 64), digits.y, 10, 50)
    with pytest.raises(DataError, match=r"channels_last needs images.*got shape \(1000, 64\)"):
        begin(flat, channels_last=True)


# --------------------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_alike_and_its_members_have_the_plain_names(digits, tmp_path, backend):
    torch._dynamo.reset()
    compiled = {"backend": backend}
    state = execute(PLAN, BACKEND, model=normalised, data=digits, directory=tmp_path, device="cpu", compile=compiled)
    *_, last = members(tmp_path)
    assert same(last, weights(state.model))
    reference = BACKEND.init(normalised, digits, PLAN, seed=0, device="cpu")
    BACKEND.train(reference, 0, 24, report=silent)
    assert close({name: torch.as_tensor(array) for name, array in last.items()}, weights(reference.model), 1e-5)


def test_compilation_happens_once_for_a_whole_run(digits):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    state = begin(digits, compile={"backend": counter})
    BACKEND.train(state, 0, 2, report=silent)
    frames = counter.frame_count
    BACKEND.train(state, 2, 24, report=silent)
    BACKEND.logits(state, digits.x)
    assert (frames, counter.frame_count) == (1, 1)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (False, None),
        (True, {}),
        ("max-autotune", {"mode": "max-autotune"}),
        ({"backend": "eager"}, {"backend": "eager"}),
    ],
)
def test_compile_takes_a_flag_a_mode_or_arguments(given, arguments):
    assert UpdateOptions(compile=given).compile_arguments == arguments


# --------------------------------------------------------------------------------------------- averaged weights


def test_averages_are_the_formula_written_out(digits):
    averages = {}

    def average(step, model):
        for name, now in model.state_dict().items():
            if step == 0:
                averages[name] = now.clone()
            elif now.is_floating_point():
                averages[name] = 0.8 * averages[name] + (1 - 0.8) * now

    state = trained(digits, model=normalised, ema=0.8)
    by_hand(digits, 12, normalised, after_update=average)
    captured = {name: torch.tensor(array) for name, array in resolved(BACKEND.capture(state)).items()}
    floating = [name for name in captured if captured[name].is_floating_point()]
    assert len(floating) == 8
    assert close({name: captured[name] for name in floating}, {name: averages[name] for name in floating}, 1e-6)
    assert not close(weights(state.model), captured, 1e-4)


def test_training_itself_does_not_feel_the_averages(digits):
    assert same(weights(trained(digits, ema=0.9).model), weights(trained(digits).model))


def test_members_and_scores_are_those_of_the_averages(digits, tmp_path):
    scored = []
    state = execute(
        PLAN,
        BACKEND,
        model=normalised,
        data=digits,
        directory=tmp_path,
        device="cpu",
        ema=0.8,
        metrics=lambda snapshot, state: scored.append(BACKEND.logits(state, digits.x)),
    )
    ensemble = SnapshotEnsemble.load(tmp_path, state.model, last=3, activation="identity")
    each = ensemble.members(torch.tensor(digits.x)).numpy()
    assert each.shape == (3, 1000, 10)
    np.testing.assert_allclose(each, np.stack(scored), atol=1e-5)


def test_averages_start_over_with_a_member_of_fresh_weights(digits, tmp_path):
    """Nothing of the member before is left in them: the second is what it is when trained alone."""
    what = program("independent", lr=0.05, steps=8, cycles=2)
    execute(what, BACKEND, model="mlp", data=digits, directory=tmp_path, seed=5, device="cpu", ema=0.95)
    alone = BACKEND.init("mlp", digits, what, seed=5, member=2, device="cpu", ema=0.95)
    BACKEND.train(alone, 8, 16, report=silent)
    assert same(members(tmp_path)[1], resolved(BACKEND.capture(alone)))


def test_a_run_of_ones_own_takes_an_averaged_model_and_resumes_with_its_count(tmp_path):
    """`weights=ema` gives members with the model's own names, which an ensemble loads."""

    def train(directory, updates):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ema = torch.optim.swa_utils.AveragedModel(model)  # an equal average, which its count decides
        with SnapshotRun(directory, CosineCycles(0.1, 12, 2), model, optimizer, weights=ema) as run:
            while run.updates < updates:
                optimizer.zero_grad()
                model(torch.full((2, 3), float(run.updates))).square().mean().backward()
                optimizer.step()
                ema.update_parameters(model)
                run.step()
        return model

    model = train(tmp_path / "whole", 12)
    for updates in (3, 6, 9, 12):
        train(tmp_path / "parts", updates)
    one, other = members(tmp_path / "whole"), members(tmp_path / "parts")
    assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert len(SnapshotEnsemble.load(tmp_path / "parts", model).models) == 2


# --------------------------------------------------------------------------------------------- float16


def overflowing(digits):
    """Images so bright that their gradients, scaled by 65,536, are infinite in float16."""
    return TrainingData(digits.x * 50, digits.y, 10, 50, seed=3)


def test_float16_tries_a_skipped_update_again_with_the_same_batch(digits):
    data, seen, updates = overflowing(digits), [], []
    state = begin(data, precision="float16")
    state.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    state.optimizer.register_step_post_hook(lambda *_: updates.append(state.optimizer.param_groups[0]["lr"]))
    reports = []
    BACKEND.train(state, 0, 12, report=lambda step, loss: reports.append((step, loss)))
    assert state.loop.scaler.get_scale() < 65536
    assert updates == [CYCLES(step) for step in range(12)]
    assert [step for step, _ in reports] == list(range(1, 13))
    assert all(math.isfinite(loss) for _, loss in reports)
    different = [seen[0], *(b for a, b in itertools.pairwise(seen) if not torch.equal(a, b))]
    assert len(seen) > 12
    assert same(
        dict(enumerate(different)),
        {step: torch.tensor(data.x[rows]) for step, rows in enumerate(data.indices(0, 12))},
    )


@pytest.mark.parametrize("fused", [False, True])
def test_float16_is_the_loop_written_by_hand_with_skipped_updates_repeated(digits, fused):
    data = overflowing(digits)

    def optimizer(module):
        return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, fused=fused)

    state = trained(data, precision="float16", optimizer=optimizer)
    model = begin(data).model
    chosen, scaler = optimizer(model), torch.amp.GradScaler("cpu")
    for step in range(12):
        chosen.param_groups[0]["lr"] = CYCLES(step)
        rows = data.indices(step, step + 1)[0]
        moved = False
        while not moved:
            before = weights(model)
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(model(torch.tensor(data.x[rows])), torch.tensor(data.y[rows]))
            scaler.scale(loss).backward()
            scaler.step(chosen)
            scaler.update()
            chosen.zero_grad()
            moved = not same(before, weights(model))
            if step == 0 and not moved:
                chosen.state.clear()  # PyTorch's fused SGD keeps a momentum of uninitialised memory otherwise
    assert state.loop.scaler.get_scale() == scaler.get_scale()
    assert same(weights(state.model), weights(model))


def test_float16_with_everything_else_still_makes_every_update(digits):
    state = trained(
        overflowing(digits), precision="float16", accumulate=5, clip_norm=1.0, ema=0.5, compile={"backend": "eager"}
    )
    assert int(state.loop.average.n_averaged) == 12
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}


def test_gradients_that_no_scale_makes_finite_end_in_an_error(digits):
    state = begin(digits, precision="float16")
    with torch.no_grad():
        state.model[1].weight.fill_(math.inf)
    with pytest.raises(DivergedError, match="overflow in float16 even with the loss scaled by"):
        BACKEND.train(state, 0, 1, report=silent)


# --------------------------------------------------------------------------------------------- all of them

COMBINATIONS = {
    "accumulate": {"accumulate": 5},
    "clip_norm": {"clip_norm": 0.1},
    "channels_last": {"channels_last": True},
    "compile": {"compile": {"backend": "eager"}},
    "ema": {"ema": 0.9},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
    "adam": {"optimizer": lambda module: torch.optim.Adam(module.parameters(), lr=1e-3), "channels_last": True},
    "all": {"precision": "float16", "accumulate": 2, "clip_norm": 0.5, "channels_last": True, "ema": 0.7},
}


class Stopped(Exception):  # noqa: N818
    """The process is gone."""


@pytest.mark.exhaustive(keep=3)
@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_run_interrupted_and_executed_again_leaves_the_members_of_one_never_stopped(digits, tmp_path, options):
    torch._dynamo.reset()
    bright = overflowing(digits)
    data = TrainingData(np.repeat(bright.x, 3, axis=1), bright.y, 10, 50, seed=3)

    def run(directory, stop_at=None):
        def report(step, loss):
            if step == stop_at:
                raise Stopped

        execute(
            PLAN,
            BACKEND,
            model=small,
            data=data,
            directory=directory,
            device="cpu",
            resume_every=5,
            report=report,
            **options,
        )

    run(tmp_path / "whole")
    for stop_at in (7, 14, 22):
        with pytest.raises(Stopped):
            run(tmp_path / "parts", stop_at)
    run(tmp_path / "parts")
    whole, parts = members(tmp_path / "whole"), members(tmp_path / "parts")
    assert [len(whole), len(parts)] == [3, 3]
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_dump_holds_averages_and_weights_and_the_scale(digits):
    options = {"precision": "float16", "ema": 0.9}
    state = trained(overflowing(digits), 6, **options)
    tensors, values = BACKEND.dump(state)
    tensors, values = {name: array.copy() for name, array in tensors.resolve().items()}, json.loads(json.dumps(values))
    other = BACKEND.load(begin(overflowing(digits), **options), tensors, values)
    assert same(weights(other.model), weights(state.model))
    assert same(weights(other.loop.average), weights(state.loop.average))
    assert other.loop.scaler.state_dict() == state.loop.scaler.state_dict()
    assert not same(weights(other.model), weights(other.loop.members))


def test_a_dump_of_other_options_is_refused(digits):
    tensors, values = BACKEND.dump(trained(digits, 2, ema=0.9))
    with pytest.raises(DataError, match=r"saved with \['average'\] beside model and optimizer, got \[\]"):
        BACKEND.load(begin(digits), tensors, values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float8"}, "precision must be one of .*'float32'.*got 'float8'"),
        ({"accumulate": 0}, "accumulate counts micro-batches, 1 or more; got 0"),
        ({"accumulate": 51}, r"accumulate must be in 1\.\.50, a process's examples per update; got 51"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0 and finite"),
        ({"clip_norm": math.inf}, "clip_norm must be above 0 and finite"),
        ({"ema": 1.0}, "ema is a decay, 0 or more and below 1"),
        ({"ema": -0.1}, "ema is a decay"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_built(digits, options, message):
    with pytest.raises(DataError, match=message):
        begin(digits, **options)


def test_an_option_that_does_not_exist_is_refused(digits, tmp_path):
    with pytest.raises(TypeError, match="precison"):
        execute(PLAN, BACKEND, model="mlp", data=digits, directory=tmp_path, precison="bfloat16")


def test_by_default_the_loop_is_the_one_written_by_hand(digits):
    """No option costs anything that is not asked for, in bits at least."""
    assert same(weights(trained(digits, model=normalised).model), weights(by_hand(digits, 12, normalised)))


def test_a_loop_over_a_loader_says_that_it_cannot_be_entered_later_on(digits):
    """A loader has no order that is a function of the step."""
    batches = [(torch.tensor(digits.x[:5]), torch.tensor(digits.y[:5]))] * 3
    model = plain((1, 8, 8), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loop = Loop(model, optimizer, LoaderFeed(batches, CPU), CYCLES, GroupRates(optimizer))
    loop.run(0, 4, silent)
    with pytest.raises(ProtocolError, match=r"update 5 was asked for after 4.*SnapshotRun.batches"):
        loop.run(5, 8, silent)
    loop.run(4, 8, silent)


def test_a_loop_of_ones_own_takes_the_same_options(digits):
    model = plain((1, 8, 8), 10)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loop = Loop(
        model, optimizer, DeviceFeed(digits, CPU), CYCLES, GroupRates(optimizer), options=UpdateOptions(ema=0.0)
    )
    loop.run(0, 3, silent)
    assert same(weights(loop.members), weights(model))
    assert not same(weights(expected), weights(model))
