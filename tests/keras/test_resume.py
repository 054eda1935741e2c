"""A `fit` that was ended and called again in a new model gives, bit for bit, the members of one never stopped."""

import functools
import os
import signal

import keras
import numpy as np
import pytest
from keras import layers, ops

from snapcore import CosineCycles, DataError, StoreError
from snapcore.store import SnapshotStore, read_point
from snapcore_keras import SnapshotCallback, SnapshotSchedule

SHORT = CosineCycles(0.02, 24, 3)  # epochs have 6 batches
ROWS = np.random.default_rng(5).normal(size=(24, 3, 2)).astype("float32")


class Pair(keras.Model):
    """Two parts, each with an optimizer of its own, as a GAN has."""

    def __init__(self):
        super().__init__()
        self.left = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        self.right = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
        self.built = True

    def compile(self, left, right, **options):
        super().compile(**options)
        self.left_optimizer, self.right_optimizer = left, right

    def call(self, x):
        return self.right(self.left(x))

    def train_step(self, data):
        tf = pytest.importorskip("tensorflow")
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = ops.mean(ops.square(self(x) - y))
        for part, optimizer in ((self.left, self.left_optimizer), (self.right, self.right_optimizer)):
            optimizer.apply(tape.gradient(loss, part.trainable_weights), part.trainable_weights)
        return {"loss": loss}


def pair(*, built=True, rate=None, kind=keras.optimizers.SGD):
    keras.utils.set_random_seed(1)
    model = Pair()
    model.compile(kind(rate or SnapshotSchedule(SHORT), momentum=0.9), keras.optimizers.Adam(0.01))
    if built:
        model.left_optimizer.build(model.left.trainable_weights)
        model.right_optimizer.build(model.right.trainable_weights)
    return model


def averaged(optimizer, **options):
    def make():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)])
        model.compile(optimizer(SnapshotSchedule(SHORT), use_ema=True, **options), "mse")
        return model

    return make


def recurrent(layer):
    def make():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input(batch_shape=(4, 3, 2)), layer(), layers.Dense(1)])
        model.compile(keras.optimizers.SGD(SnapshotSchedule(SHORT), momentum=0.9), "mse")
        return model

    return make


def fit(fits, model, *callbacks, epochs=4, optimizer=None, directory=None, **options):
    x = ROWS if len(model.input_shape) == 3 else fits.X
    callback = SnapshotCallback(directory, SHORT, optimizer=optimizer, **options)
    return model.fit(x, fits.Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks, callback])


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        averaged(keras.optimizers.SGD, momentum=0.9),
        averaged(keras.optimizers.Adam, ema_momentum=0.5, ema_overwrite_frequency=5),
    ],
)
def test_averages_that_keras_puts_in_at_the_end_are_not_resumed_from(fits, tmp_path, make, epochs):
    fit(fits, make(), directory=tmp_path / "whole")
    first = make()
    fit(fits, first, directory=tmp_path / "run", epochs=epochs)
    fit(fits, make(), directory=tmp_path / "run")
    assert fits.same(fits.members(tmp_path / "run"), fits.members(tmp_path / "whole"))


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("before", [True, False])
def test_the_best_weights_of_early_stopping_are_not_resumed_from(fits, tmp_path, unbroken, before):
    # The loss falls, so the first epoch is "best" where more is better, and the next one ends training.
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    callback, model = SnapshotCallback(tmp_path / "run", SHORT), fits.network(SHORT)
    history = fits.fit(model, *([stop, callback] if before else [callback, stop]), epochs=40)
    done = 6 * len(history.epoch)
    assert read_point(tmp_path / "run").state["place"]["step"] == done < 24
    watch = fits.Watch()
    fits.fit(fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT), watch)
    assert len(watch.weights) == 24 - done
    assert fits.same(fits.members(tmp_path / "run"), unbroken)


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize(
    "make",
    [
        recurrent(lambda: layers.GRU(3, stateful=True)),
        recurrent(lambda: layers.Bidirectional(layers.LSTM(2, stateful=True))),
        recurrent(lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)], stateful=True)),
    ],
)
def test_what_recurrent_layers_keep_from_batch_to_batch_is_resumed(fits, tmp_path, make):
    for name, parts in (("whole", (4,)), ("run", (1, 3, 4))):
        for epochs in parts:
            done = {1: 0, 3: 1, 4: 3 if len(parts) > 1 else 0}[epochs]
            fit(fits, make(), directory=tmp_path / name, epochs=epochs - done)
    assert fits.same(fits.members(tmp_path / "run"), fits.members(tmp_path / "whole"))


@pytest.mark.exhaustive
def test_a_second_optimizer_of_a_model_is_resumed_with_its_moments(fits, tmp_path):
    for name, parts in (("whole", (4,)), ("run", (1, 1, 2))):
        for epochs in parts:
            model = pair()
            callback = SnapshotCallback(tmp_path / name, SHORT, optimizer=model.left_optimizer)
            fits.fit(model, callback, epochs=epochs)
    assert fits.same(fits.members(tmp_path / "run"), fits.members(tmp_path / "whole"))


def test_a_second_optimizer_that_is_not_built_is_not_resumed_into(fits, tmp_path):
    for built in (True, False):
        model = pair(built=built)
        before = model.get_weights()
        callback = SnapshotCallback(tmp_path / "run", SHORT, optimizer=model.left_optimizer)
        if built:
            fits.fit(model, callback, epochs=1)
            continue
        with pytest.raises(DataError, match=r"holds the model's right_optimizer too, which is not built: call"):
            fits.fit(model, callback)
        assert all(np.array_equal(*both) for both in zip(model.get_weights(), before, strict=True))


def interrupt(times):
    def act(model):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    return act


class At(keras.callbacks.Callback):
    """Does something after so many batches."""

    def __init__(self, batches, act):
        super().__init__()
        self.left, self.act = batches, act

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            self.act(self.model)


@pytest.fixture
def unbroken(fits, tmp_path):
    """The members of a run that was never stopped."""
    fits.fit(fits.network(SHORT), SnapshotCallback(tmp_path / "whole", SHORT))
    return fits.members(tmp_path / "whole")


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize(("position", "batch"), [(0, 12), (1, 11)])
def test_the_first_ctrl_c_leaves_a_resume_point_after_the_next_update(fits, tmp_path, unbroken, position, batch):
    callbacks = [SnapshotCallback(tmp_path / "run", SHORT)]
    callbacks.insert(position, At(batch, interrupt(1)))
    with pytest.raises(KeyboardInterrupt):
        fits.fit(fits.network(SHORT), *callbacks)
    assert read_point(tmp_path / "run").state["place"]["step"] == 12
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    watch = fits.Watch()
    fits.fit(fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT), watch)
    assert len(watch.weights) == 12
    assert fits.same(fits.members(tmp_path / "run"), unbroken)


def test_the_second_ctrl_c_leaves_at_once_and_the_next_fit_resumes(fits, tmp_path):
    seen, watch, callback = [], fits.Watch(), SnapshotCallback(tmp_path / "run", SHORT)
    with pytest.raises(KeyboardInterrupt):
        fits.fit(fits.network(SHORT), At(11, interrupt(2)), At(11, seen.append), callback)
    assert not seen
    fits.fit(fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT), watch)
    assert len(watch.weights) == 13  # the run that was left open was closed first, and that wrote a point
    assert [*fits.members(tmp_path / "run")] == [8, 16, 24]


@pytest.mark.parametrize("other", [keras.optimizers.Adam, functools.partial(keras.optimizers.Lion, weight_decay=0.1)])
def test_another_kind_of_optimizer_is_refused_before_anything_is_touched(fits, tmp_path, other):
    fits.fit(fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT), epochs=2)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    model = fits.network(SHORT)
    model.compile(other(SnapshotSchedule(SHORT)), "mse")
    before = model.get_weights()
    with pytest.raises(StoreError, match=r"trained by SGD, got (Adam|Lion): give that optimizer"):
        fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT))
    assert all(np.array_equal(*both) for both in zip(model.get_weights(), before, strict=True))
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 0.5}, "momentum 0.9 saved, 0.5 given, 0.5 in force"),
        ({"momentum": 0.9, "clipnorm": 1.5}, "clipnorm None saved, 1.5 given, 1.5 in force"),
        ({"momentum": 0.9, "nesterov": True}, "nesterov False saved, True given, True in force"),
    ],
)
def test_settings_that_differ_from_the_saved_runs_are_named_once(fits, tmp_path, caplog, options, said):
    fits.fit(fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT), epochs=2)
    model = fits.network(SHORT)
    model.compile(keras.optimizers.SGD(SnapshotSchedule(SHORT), **options), "mse")
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT))
    (line,) = [record.getMessage() for record in caplog.records if "settings differ" in record.getMessage()]
    assert line.endswith(f"settings differ from those of the saved run: {said}")


def test_members_are_handed_over_as_they_are_taken_and_their_metrics_are_recorded(fits, tmp_path):
    model, seen = fits.network(SHORT), []

    def measure(snapshot):
        return {"norm": float(np.abs(model.get_weights()[0]).sum())}

    def take(snapshot):
        seen.append((snapshot.step, measure(snapshot)))

    for epochs in (2, 2):
        callback = SnapshotCallback(tmp_path / "run", SHORT, on_member=take, metrics=measure)
        fits.fit(model, callback, epochs=epochs)
    store = SnapshotStore(tmp_path / "run")
    assert [step for step, _ in seen] == [8, 16, 24]
    assert [(member.step, dict(member.metrics)) for member in store.members] == seen
    sums = [float(np.abs(store.load(index)["000/dense/kernel"]).sum()) for index in (1, 2, 3)]
    assert [values["norm"] for _, values in seen] == pytest.approx(sums)


def test_what_is_raised_by_a_hook_of_the_users_ends_training_with_the_member_kept(fits, tmp_path):
    def refuse(snapshot):
        raise LookupError(snapshot.index)

    callback = SnapshotCallback(tmp_path / "run", SHORT, on_member=refuse)
    with pytest.raises(LookupError):
        fits.fit(fits.network(SHORT), callback)
    callback.close()
    assert [member.step for member in SnapshotStore(tmp_path / "run").members] == [8]
