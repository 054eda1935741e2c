"""The native loop does what a hand would have written, is traced once, and stops anywhere without a trace."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from snapcore import CosineCycles, Program, StepDecay
from snapcore.backend import resolved
from snapcore.data import TrainingData
from snapcore_tensorflow.backend import TensorFlowBackend
from snapcore_tensorflow.training import CHUNK

BACKEND = TensorFlowBackend()
CYCLES = CosineCycles(lr=0.05, steps=450, cycles=3)


def begun(data, model="mlp", *, schedule=CYCLES, seed=7, **options):
    return BACKEND.init(model, data, Program("test", schedule), seed=seed, **options)


def silent(step, loss):
    pass


def ran(state, *stops, report=silent):
    start = 0
    for stop in stops:
        state, start = BACKEND.train(state, start, stop, report=report), stop
    return state


def everything(state):
    """All that training continues with, by position: Keras names moments by counters that the process shares."""
    return {"/".join(name.split("/")[:3]): array for name, array in resolved(BACKEND.dump(state)[0]).items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def dropping(input_shape, n_classes):
    """A small model with dropout and batch statistics."""
    middle = [layers.Dense(16), layers.BatchNormalization(), layers.Dropout(0.5), layers.ReLU()]
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), *middle, layers.Dense(n_classes)])


def linear(input_shape, n_classes, **options):
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), layers.Dense(n_classes, **options)])


def by_hand(data, updates, *, velocity, decay=1e-4):
    """Logistic regression in NumPy: equation 2 of the paper, and Nesterov's momentum by either rule."""
    state = begun(data, linear)
    weights = [array.astype(np.float64) for array in BACKEND.capture(state).resolve().values()]
    moments, losses = [np.zeros_like(array) for array in weights], []
    for step in range(updates):
        rate = 0.05 / 2 * (np.cos(np.pi * (step % 150) / 150) + 1)
        rows = data.indices(step, step + 1)[0]
        x, y = data.x[rows].reshape(len(rows), -1).astype(np.float64), data.y[rows]
        logits = x @ weights[0] + weights[1]
        powers = np.exp(logits - logits.max(1, keepdims=True))
        likely = powers / powers.sum(1, keepdims=True)
        losses.append(-np.log(likely[np.arange(len(y)), y]).mean())
        off = (likely - np.eye(data.n_classes)[y]) / len(y)
        for position, plain in enumerate((x.T @ off, off.sum(0))):
            gradient = plain + decay * weights[position]
            if velocity == "gradients":
                moments[position] = 0.9 * moments[position] + gradient
                weights[position] = weights[position] - rate * (gradient + 0.9 * moments[position])
            else:
                moments[position] = 0.9 * moments[position] - rate * gradient
                weights[position] = weights[position] + 0.9 * moments[position] - rate * gradient
    return weights, losses


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("velocity", ["gradients", "updates"])
def test_the_loop_is_the_one_written_by_hand(digits, velocity, xla):
    reports = []
    state = ran(begun(digits, linear, velocity=velocity, xla=xla), 300, report=lambda *report: reports.append(report))
    weights, losses = by_hand(digits, 300, velocity=velocity)
    for found, wanted in zip(BACKEND.capture(state).resolve().values(), weights, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert [step for step, _ in reports] == list(range(1, 301))
    np.testing.assert_allclose([loss for _, loss in reports], losses, rtol=1e-4)


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("model", ["mlp", dropping])
@given(cuts=st.sets(st.integers(1, CHUNK + 29), max_size=5))
@settings(max_examples=6, deadline=None)
def test_wherever_a_segment_is_cut_the_weights_are_the_same_to_the_bit(digits, model, cuts):
    whole = ran(begun(digits, model), CHUNK + 30)
    parts = ran(begun(digits, model), *sorted(cuts), CHUNK + 30)
    assert same(everything(whole), everything(parts))


@pytest.mark.exhaustive
def test_with_xla_too_the_cut_does_not_show_and_the_result_is_as_without(digits):
    whole, parts = (ran(begun(digits, xla=True), *stops) for stops in ([230], [1, 77, 201, 230]))
    assert same(everything(whole), everything(parts))
    plain = everything(ran(begun(digits), 230))
    for name, array in everything(whole).items():
        np.testing.assert_allclose(array, plain[name], atol=1e-5, err_msg=name)


def test_every_loss_is_reported_once_and_in_order_a_chunk_at_a_time(digits):
    reports, known, stop = [], [], 2 * CHUNK + 5

    class Telling:
        x, y, n_classes = digits.x, digits.y, digits.n_classes
        loss, ignore, n_outputs = digits.loss, digits.ignore, digits.n_outputs

        def indices(self, start, stop):
            known.append(len(reports))
            return digits.indices(start, stop)

    ran(begun(Telling()), 3, 3, stop, report=lambda *report: reports.append(report))
    assert [step for step, _ in reports] == list(range(1, stop + 1))
    assert all(type(step) is int and type(loss) is float for step, loss in reports)
    assert set(known) <= {0, 3, 3 + CHUNK}  # those of a chunk wait for the next to be begun
    singly = []
    ran(begun(digits), *range(1, 31), report=lambda *report: singly.append(report))
    assert reports[:30] == singly


def test_cycles_of_any_length_are_traced_once(digits):
    traced = []

    @keras.saving.register_keras_serializable(package="tests")
    class Counting(layers.Layer):
        def call(self, x):
            traced.append(tf.executing_eagerly() or isinstance(x, keras.KerasTensor))
            return x

    def model(input_shape, n_classes):
        return keras.Sequential([linear(input_shape, n_classes), Counting()])

    state = begun(digits, model)
    traced.clear()
    ran(state, 1, CHUNK, CHUNK + 17, 2 * CHUNK + 50)
    assert len(traced) == 1


@pytest.mark.parametrize("schedule", [CYCLES, StepDecay(0.1, 2 * CHUNK)])
def test_every_update_is_done_at_the_rate_of_the_schedule(digits, schedule):
    """Of black images only the bias is seen, and its gradient is known."""
    data = TrainingData(np.zeros((50, 1, 8, 8), np.float32), np.ones(50, int), 2, 50, seed=3)
    for updates in (1, 60, CHUNK + 1):
        state = ran(begun(data, linear, schedule=schedule, momentum=0.0, weight_decay=0.0), updates)
        bias = np.zeros(2)
        for step in range(updates):
            bias -= schedule(step) * (np.exp(bias) / np.exp(bias).sum() - [0, 1])
        np.testing.assert_allclose(BACKEND.capture(state).resolve()["001/dense/bias"], bias, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, keras.optimizers.AdamW])
def test_whatever_an_optimizer_counts_the_rate_is_that_of_the_step(digits, optimizer):
    state = begun(digits, optimizer=optimizer)
    BACKEND.train(state, 100, 101, report=silent)
    assert float(state.optimizer.learning_rate) == np.float32(CYCLES(100))
    assert int(state.optimizer.iterations) == 101


def test_losses_of_the_models_own_count(digits):
    """What layers add is part of the loss, as in Keras' own training."""

    def regularized(input_shape, n_classes):
        return linear(input_shape, n_classes, kernel_regularizer=keras.regularizers.L2(0.05))

    found, decayed = [], []
    options = {"momentum": 0.0, "weight_decay": 0.0}
    ran(begun(digits, regularized, **options), 60, report=lambda _, loss: found.append(loss))
    state = begun(digits, regularized, **options)
    kernel = next(iter(BACKEND.capture(state).resolve().values()))
    state = ran(begun(digits, linear, **options), 1, report=lambda _, loss: decayed.append(loss))
    assert found[0] == pytest.approx(decayed[0] + 0.05 * np.square(kernel).sum(), rel=1e-5)
    assert found[-1] < found[0]


def test_a_loss_that_is_scaled_gives_the_weights_of_one_that_is_not(digits):
    def scaling(rate):
        return keras.optimizers.SGD(rate, loss_scale_factor=1024.0)

    plain, scaled = (ran(begun(digits, optimizer=each), 30) for each in (keras.optimizers.SGD, scaling))
    for one, other in zip(plain.model.weights, scaled.model.weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_bfloat16_computes_narrow_and_keeps_wide_weights(digits):
    seen, losses = set(), []

    class Watched(layers.Dense):
        def call(self, x):
            outputs = super().call(x)
            seen.update((x.dtype, outputs.dtype))
            return outputs

    def model(input_shape, n_classes):
        return keras.Sequential([keras.Input(input_shape), layers.Flatten(), Watched(n_classes)])

    state = begun(digits, model, precision="bfloat16")
    seen.clear()
    ran(state, 60, report=lambda _, loss: losses.append(loss))
    assert seen == {tf.bfloat16}
    assert {array.dtype for array in BACKEND.capture(state).resolve().values()} == {np.dtype(np.float32)}
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


def test_a_copy_of_the_weights_is_not_changed_by_the_updates_after(digits):
    state = ran(begun(digits, "cnn"), 2)
    expected = {name: array.copy() for name, array in BACKEND.capture(state).resolve().items()}
    pending = BACKEND.capture(state)
    BACKEND.train(state, 2, 10, report=silent)
    assert same(pending.resolve(), expected)
