"""The native loop does what a hand would have written, is compiled once, and holds its weights once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from snapcore import CosineCycles, Program, StepDecay
from snapcore.data import TrainingData
from snapcore_jax.backend import JaxBackend
from snapcore_jax.losses import cross_entropy
from snapcore_jax.state import named_leaves
from snapcore_jax.training import CHUNK
from snapcore_jax.updates import Sgd

BACKEND = JaxBackend()
CYCLES = CosineCycles(lr=0.05, steps=240, cycles=3)


class Line(nnx.Module):
    """One number, whatever the examples are: its gradient is what the loss makes of it."""

    def __init__(self, input_shape, n_classes, rngs):
        self.weight = nnx.Param(jnp.zeros(()))

    def __call__(self, x):
        return self.weight + 0 * x.reshape(len(x), -1)[:, :1]


def total(outputs, labels):
    return outputs.sum() / len(outputs)


def begun(data, model="mlp", *, schedule=CYCLES, loss=cross_entropy, seed=7, at_once=CHUNK, **options):
    state = BACKEND.init(model, data, Program("test", schedule), seed=seed, **options)
    step = dataclasses.replace(state.loop.step, loss=loss)
    return dataclasses.replace(state, loop=dataclasses.replace(state.loop, step=step, at_once=at_once))


class Dropping(nnx.Module):
    """A small model with dropout."""

    def __init__(self, input_shape, n_classes, rngs):
        self.hidden, self.output = nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, n_classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(nnx.relu(self.hidden(x.reshape(len(x), -1)))))


def silent(step, loss):
    pass


def ran(state, *stops, report=silent):
    start = 0
    for stop in stops:
        state, start = BACKEND.train(state, start, stop, report=report), stop
    return state


def everything(state):
    return {name: np.array(array) for name, array in named_leaves(state.training._asdict()).items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def by_hand(data, updates):
    """An ordinary loop, with the paper's equation 2, and momentum in Nesterov's form as Sutskever et al. write it."""
    state = begun(data)
    weights = {name: np.array(array) for name, array in named_leaves(state.weights).items()}
    moments, losses = {name: np.zeros_like(array) for name, array in weights.items()}, []

    @jax.jit
    def graded(w, x, y):
        def loss(w):
            hidden = nnx.relu(x.reshape(len(x), -1) @ w["hidden/0/kernel"] + w["hidden/0/bias"])
            hidden = nnx.relu(hidden @ w["hidden/1/kernel"] + w["hidden/1/bias"])
            log = jax.nn.log_softmax(hidden @ w["output/kernel"] + w["output/bias"])
            return -log[jnp.arange(len(y)), y].mean()

        return jax.value_and_grad(loss)(w)

    for step in range(updates):
        rate = 0.05 / 2 * (np.cos(np.pi * (step % 80) / 80) + 1)
        rows = data.indices(step, step + 1)[0]
        loss, gradients = graded(weights, data.x[rows], data.y[rows])
        for name, weight in weights.items():
            gradient = np.array(gradients[name]) + 1e-4 * weight
            moments[name] = 0.9 * moments[name] + gradient
            weights[name] = (weight - rate * (gradient + 0.9 * moments[name])).astype(np.float32)
        losses.append(float(loss))
    return weights, losses


@pytest.mark.parametrize("at_once", [1, CHUNK])
def test_the_loop_is_the_one_written_by_hand(digits, at_once):
    reports = []
    state = ran(begun(digits, at_once=at_once), 100, report=lambda *report: reports.append(report))
    weights, losses = by_hand(digits, 100)
    for name, array in named_leaves(state.weights).items():
        np.testing.assert_allclose(array, weights[name], atol=2e-5, err_msg=name)
    assert [step for step, _ in reports] == list(range(1, 101))
    np.testing.assert_allclose([loss for _, loss in reports], losses, rtol=1e-3)


@pytest.mark.exhaustive(keep=2)
@pytest.mark.parametrize("at_once", [1, CHUNK])
@pytest.mark.parametrize("model", ["mlp", Dropping])
@given(cuts=st.sets(st.integers(1, CHUNK + 29), max_size=5))
@settings(max_examples=6, deadline=None)
def test_wherever_a_segment_is_cut_the_weights_are_the_same_to_the_bit(digits, model, at_once, cuts):
    whole = ran(begun(digits, model, at_once=at_once), CHUNK + 30)
    parts = ran(begun(digits, model, at_once=at_once), *sorted(cuts), CHUNK + 30)
    assert same(everything(whole), everything(parts))


@pytest.mark.parametrize("at_once", [1, CHUNK])
def test_every_loss_is_reported_once_and_in_order_a_chunk_at_a_time(digits, at_once):
    reports, known, stop = [], [], 2 * CHUNK + 5
    counting = digits_that_call(digits, lambda: known.append(len(reports)))
    ran(begun(counting, at_once=at_once), 3, 3, stop, report=lambda *report: reports.append(report))
    assert [step for step, _ in reports] == list(range(1, stop + 1))
    assert all(type(step) is int and type(loss) is float for step, loss in reports)
    assert set(known) <= {0, 3, 3 + CHUNK, 3 + 2 * CHUNK}  # nothing is read back in between
    singly = []
    ran(begun(digits, at_once=at_once), *range(1, 31), report=lambda *report: singly.append(report))
    assert reports[:30] == singly


class Rnn(nnx.Module):
    """A model with a loop of its own, and in it, if asked for, a convolution."""

    def __init__(self, input_shape, n_classes, rngs, *, convolution):
        self.narrow = nnx.Conv(8, 8, (3,), rngs=rngs) if convolution else nnx.Linear(8, 8, rngs=rngs)
        self.output = nnx.Linear(64, n_classes, rngs=rngs)

    def __call__(self, x):
        graph, state = nnx.split(self.narrow)
        hidden = lax.fori_loop(0, 2, lambda _, h: nnx.relu(nnx.merge(graph, state)(h)), x[:, 0])
        return self.output(hidden.reshape(len(x), -1))


@pytest.mark.exhaustive(keep=2)
@pytest.mark.parametrize(
    ("model", "at_once"),
    [("mlp", CHUNK), ("cnn", 1), (partial(Rnn, convolution=False), CHUNK), (partial(Rnn, convolution=True), 1)],
)
def test_on_a_cpu_updates_are_compiled_in_loops_but_one_by_one_where_there_is_a_convolution(digits, model, at_once):
    state = BACKEND.init(model, digits, Program("test", CYCLES), seed=7)
    assert state.loop.at_once == at_once


def test_elsewhere_every_model_is_compiled_in_loops(digits):
    class Elsewhere:
        def devices(self):
            return {type("Device", (), {"platform": "gpu"})()}

    state = begun(digits, "cnn", at_once=1)
    there = dataclasses.replace(state.loop, x=Elsewhere())
    assert there.fitted(state.training, state.key).at_once == CHUNK


def digits_that_call(digits, called):
    class Telling:
        x, y, n_classes = digits.x, digits.y, digits.n_classes
        loss, ignore, n_outputs = digits.loss, digits.ignore, digits.n_outputs

        def indices(self, start, stop):
            called()
            return digits.indices(start, stop)

    return Telling()


@pytest.fixture
def compilations():
    """What XLA has compiled since."""
    seen = []

    def listen(event, seconds, **rest):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("at_once", [1, CHUNK])
def test_cycles_of_any_length_are_compiled_once_and_so_are_runs_that_differ_in_the_schedule(
    digits, at_once, compilations
):
    def loss(outputs, labels):
        return 2 * cross_entropy(outputs, labels)

    states = [begun(digits, at_once=at_once, loss=loss) for _ in range(2)]
    states.append(begun(digits, at_once=at_once, loss=loss, schedule=StepDecay(0.01, 300), seed=8))
    compilations.clear()
    ran(states[0], CHUNK + 1)
    assert len(compilations) == 1
    ran(states[1], 1, CHUNK, 2 * CHUNK + 1)
    ran(states[2], CHUNK - 1, CHUNK + 16)
    assert len(compilations) == 1


@pytest.mark.parametrize("at_once", [1, CHUNK])
def test_weights_and_moments_are_given_away_so_that_they_exist_once(digits, at_once):
    state = begun(digits, at_once=at_once)
    given = jax.tree.leaves(state.training)
    ran(state, 1)
    assert all(array.is_deleted() for array in given)


def test_a_capture_neither_stops_the_giving_away_nor_is_changed_by_it(digits):
    state = ran(begun(digits), 2)
    expected = {name: np.array(array) for name, array in named_leaves(state.weights).items()}
    state = ran(begun(digits), 2)  # of which no view was taken
    pending, given = BACKEND.capture(state), jax.tree.leaves(state.training)
    BACKEND.train(state, 2, 60, report=silent)
    assert all(array.is_deleted() for array in given)
    resolved = pending.resolve()
    assert same(resolved, expected)
    assert all(array.flags.owndata for array in resolved.values())


@pytest.mark.parametrize("at_once", [1, CHUNK])
@pytest.mark.parametrize("schedule", [CYCLES, StepDecay(0.1, 2 * CHUNK)])
def test_every_update_is_done_at_the_rate_of_the_schedule(digits, schedule, at_once):
    plain = {"momentum": 0.0, "weight_decay": 0.0}
    for updates in (1, 60, 61, CHUNK + 1):
        state = ran(begun(digits, Line, schedule=schedule, at_once=at_once, loss=total, **plain), updates)
        travelled = -sum(schedule(step) for step in range(updates))
        assert float(state.training.params["weight"][...]) == pytest.approx(travelled, rel=1e-5)


def test_whatever_an_optimizer_counts_the_rate_is_that_of_the_step(digits):
    state = begun(digits, Line, loss=total, optimizer=optax.sgd)
    state = BACKEND.train(state, 100, 101, report=silent)
    assert float(state.training.params["weight"][...]) == pytest.approx(-CYCLES(100), rel=1e-6)


def test_weight_decay_is_part_of_the_gradient_and_momentum_is_nesterovs():
    optimizer = Sgd(momentum=0.5, weight_decay=0.1)(lambda _: 0.2)
    weight, buffer = jnp.float32(3.0), 0.0
    state, expected = optimizer.init(weight), 3.0
    for gradient in (1.0, -2.0, 0.5):
        updates, state = optimizer.update(jnp.float32(gradient), state, weight)
        weight = optax.apply_updates(weight, updates)
        decayed = gradient + 0.1 * expected
        buffer = 0.5 * buffer + decayed
        expected -= 0.2 * (decayed + 0.5 * buffer)
        assert float(weight) == pytest.approx(expected, rel=1e-6)


def test_bfloat16_computes_narrow_and_keeps_wide_weights(digits):
    seen = set()

    class Watched(nnx.Module):
        def __init__(self, input_shape, n_classes, rngs):
            self.linear = nnx.Linear(64, n_classes, rngs=rngs)

        def __call__(self, x):
            outputs = self.linear(x.reshape(len(x), -1))
            seen.update((x.dtype, self.linear.kernel.dtype, outputs.dtype))
            return outputs

    losses = []
    state = ran(begun(digits, Watched, precision="bfloat16"), 60, report=lambda _, loss: losses.append(loss))
    assert seen == {jnp.dtype("bfloat16")}
    assert {array.dtype for array in everything(state).values()} <= {np.dtype("float32"), np.dtype("int32")}
    assert np.mean(losses[-10:]) < losses[0]


def test_labels_of_any_integer_type_train_alike(digits):
    states = []
    for dtype in (np.uint8, np.int32, np.int64):
        data = TrainingData(digits.x, digits.y.astype(dtype), 10, 50, seed=3)
        states.append(everything(ran(begun(data), 3)))
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def test_examples_are_left_alone_and_may_be_read_only(digits):
    x = digits.x.copy()
    x.flags.writeable = False
    ran(begun(TrainingData(x, digits.y, 10, 50, seed=3)), 3)
    assert np.array_equal(x, digits.x)


class Noise(nnx.Module):
    """A weight whose gradient is what dropout left of eight ones, and again of eight."""

    def __init__(self, input_shape, n_classes, rngs):
        self.weight = nnx.Param(jnp.zeros(16))
        self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jnp.concatenate([self.first(self.weight[:8]), self.second(self.weight[8:])])[None]


def moved_by_noise(digits, start, stop, seed=7):
    flat = StepDecay(1.0, 120, milestones=())
    state = begun(digits, Noise, schedule=flat, loss=total, seed=seed, momentum=0.0, weight_decay=0.0)
    return np.array(BACKEND.train(state, start, stop, report=silent).training.params["weight"][...])


def test_dropout_is_another_in_every_update_and_layer_and_a_function_of_seed_and_step(digits):
    draws = [moved_by_noise(digits, step, step + 1) for step in range(6)]
    assert all(set(draw) <= {0.0, -2.0} for draw in draws)
    halves = [tuple(half) for draw in draws for half in (draw[:8], draw[8:])]
    assert len(set(halves)) > 8
    assert np.array_equal(moved_by_noise(digits, 0, 6), sum(draws))
    assert np.array_equal(moved_by_noise(digits, 3, 4), draws[3])
    assert not all(np.array_equal(moved_by_noise(digits, step, step + 1, seed=8), draws[step]) for step in range(3))
