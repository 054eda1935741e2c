"""The callback for `fit`: what it counts, when it takes snapshots, and where it resumes."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st
from keras import layers

from snapcore import (
    CosineCycles,
    CycleWarning,
    DataError,
    DivergedError,
    ProtocolError,
    ScheduleError,
    StoreError,
    program,
)
from snapcore.store import SnapshotStore, read_point
from snapcore_keras import SnapshotCallback, SnapshotSchedule
from snapcore_keras.run import KerasRun
from snapcore_keras.steps_per_execution import check_cycles

SHORT = CosineCycles(0.02, 24, 3)  # epochs have 6 batches


def steps(directory):
    return [member.step for member in SnapshotStore(directory).members]


def shown(fits, rate, **options):
    """A model whose one weight shows the rate of the last update."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    model.compile(fits.Shown(rate, **options), "mse")
    return model


class At(keras.callbacks.Callback):
    """Does something after so many batches."""

    def __init__(self, batches, act):
        super().__init__()
        self.left, self.act = batches, act

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            self.act(self.model)


def die(model):
    raise InterruptedError


@pytest.fixture
def unbroken(fits, tmp_path):
    """The weights after every update of a run that was never stopped, in a fit that another callback watched."""
    watch = fits.Watch()
    fits.fit(fits.network(SHORT), watch)
    return {step: watch.weights[step] for step in SHORT.snapshot_steps}


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_gradients_are_one_update(fits, tmp_path, accumulation, formula):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    rate = SnapshotSchedule(SHORT, gradient_accumulation_steps=accumulation)
    model.compile(fits.Shown(rate, gradient_accumulation_steps=accumulation), "mse")
    callback, watch = fits.Counted(tmp_path / "run", SHORT), fits.Watch()
    fits.fit(model, callback, watch, epochs=99)  # 6 batches: with 4 to an update, some span epochs
    assert steps(tmp_path / "run") == [8, 16, 24]
    assert len(watch.weights) == 24 * accumulation
    expected = [formula(step) for step in range(24)]
    rates = [float(watch.weights[(step + 1) * accumulation][0].max()) for step in range(24)]
    assert rates == pytest.approx(expected, abs=4e-7 * 0.02, rel=0)
    assert callback.looks == 2 + 3


def test_an_execution_may_hold_several_updates_of_several_batches(fits, tmp_path):
    model = fits.network(SHORT, 0.1, steps_per_execution=8)
    model.optimizer.gradient_accumulation_steps = 2
    watch = fits.Watch()
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT), watch, batch_size=3, epochs=99)  # 8 batches: 4 updates
    assert steps(tmp_path / "run") == [8, 16, 24]
    assert len(watch.weights) == 6
    assert all(
        np.array_equal(*pair)
        for index, after in enumerate((2, 4, 6), 1)
        for pair in zip(SnapshotStore(tmp_path / "run").load(index).values(), watch.weights[after], strict=True)
    )


def test_an_epochs_last_execution_may_be_shorter_if_no_snapshot_is_due_in_one(fits, tmp_path):
    fits.fit(fits.network(SHORT, steps_per_execution=4), SnapshotCallback(tmp_path / "run", SHORT), batch_size=3)
    assert steps(tmp_path / "run") == [8, 16, 24]
    with pytest.raises(ProtocolError, match=r"due 8 batches from here.*an epoch has 6.*steps_per_execution=2"):
        fits.fit(fits.network(SHORT, steps_per_execution=4), SnapshotCallback(tmp_path / "other", SHORT))
    fits.fit(fits.network(SHORT, steps_per_execution=2), SnapshotCallback(tmp_path / "other", SHORT))
    assert steps(tmp_path / "other") == [8, 16, 24]


def test_cycles_that_executions_do_not_divide_are_refused_with_the_nearest_that_works(fits, tmp_path):
    with pytest.raises(ScheduleError, match=r"cycle of 8 updates.*executions of 5.*: pass steps=30"):
        fits.fit(fits.network(SHORT, steps_per_execution=5), SnapshotCallback(tmp_path / "run", SHORT))
    assert not (tmp_path / "run").exists()


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.integers(1, 4))
def test_the_nearest_cycles_named_are_the_nearest_there_are(length, cycles, per_execution, accumulation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CycleWarning)
        schedule = CosineCycles(0.1, cycles * length, cycles)
    fits = [each for each in range(1, 99) if each * accumulation % per_execution == 0]
    if length in fits:
        check_cycles(schedule, per_execution, accumulation)
        return
    with pytest.raises(ScheduleError) as refusal:
        check_cycles(schedule, per_execution, accumulation)
    nearest = min(abs(each - length) for each in fits)
    named = " or ".join(str(each * cycles) for each in fits if abs(each - length) == nearest)
    assert f": pass steps={named}, or steps_per_execution=" in str(refusal.value)
    other = int(str(refusal.value).rsplit("steps_per_execution=", 1)[1])
    assert per_execution % other == length * accumulation % other == 0
    assume(other > 1)


def test_a_warm_up_that_executions_do_not_divide_is_refused_too():
    with pytest.raises(ScheduleError, match=r": pass warmup_steps=8 and steps=48 or 68, or steps_per_execution=2$"):
        check_cycles(CosineCycles(0.1, 60, 5, warmup_steps=10), 4, 1)


def test_epochs_that_fit_begins_late_or_asks_for_in_vain_change_nothing(fits, tmp_path, unbroken):
    watch = fits.Watch()
    history = fits.fit(
        fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT), watch, initial_epoch=3, epochs=50
    )
    assert history.epoch == [3, 4, 5, 6]  # the program has ended
    assert len(watch.weights) == 24
    assert fits.same(fits.members(tmp_path / "run"), unbroken)


def test_validation_is_not_counted(fits, tmp_path, unbroken):
    model, data = fits.network(SHORT), (fits.X, fits.Y)
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT), validation_data=data, validation_batch_size=1)
    assert fits.same(fits.members(tmp_path / "run"), unbroken)


@pytest.mark.parametrize("anew", [False, True])
def test_several_fits_are_one_run(fits, tmp_path, unbroken, anew):
    model, callback = fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT, resume=False)
    for _ in range(4):
        fits.fit(model, callback, epochs=1)
        if anew:
            callback = SnapshotCallback(tmp_path / "run", SHORT)
    assert fits.same(fits.members(tmp_path / "run"), unbroken)
    with pytest.raises(StoreError, match="finished"):
        fits.fit(model, callback, epochs=1)
    assert not (tmp_path / "run.1").exists()


def test_a_plain_rate_is_replaced_also_where_a_fit_before_has_compiled_it(fits, tmp_path, formula):
    model, watch = shown(fits, 0.7), fits.Watch()
    fits.fit(model, epochs=1)
    assert model.get_weights()[0].max() == pytest.approx(0.7)
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT), watch)
    rates = [float(watch.weights[step][0].max()) for step in range(1, 25)]
    assert rates == pytest.approx([formula(step) for step in range(24)], abs=4e-7 * 0.02, rel=0)
    assert steps(tmp_path / "run") == [8, 16, 24]


def test_updates_that_a_scaled_loss_skips_are_not_counted(fits, tmp_path):
    model, watch, rows = keras.Sequential([keras.Input((4,)), layers.Dense(1)]), fits.Watch(), fits.X.copy()
    rows[:4] = np.inf  # the first of 6 batches, in each epoch
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=4.0), "mse")
    model.fit(
        rows,
        fits.Y,
        batch_size=4,
        epochs=9,
        shuffle=False,
        verbose=0,
        callbacks=[SnapshotCallback(tmp_path / "run", SHORT), watch],
    )
    assert steps(tmp_path / "run") == [8, 16, 24]
    assert len(watch.weights) == 29  # 24 updates, and a batch skipped in each of 5 epochs
    expected = {8: watch.weights[10], 16: watch.weights[20], 24: watch.weights[29]}
    assert fits.same(fits.members(tmp_path / "run"), expected)


class Twice(keras.Model):
    """Does two updates for every batch."""

    def train_step(self, data):
        super().train_step(data)
        return super().train_step(data)


def test_a_train_step_of_ones_own_may_do_several_updates(fits, tmp_path):
    inputs = keras.Input((4,))
    model = Twice(inputs, layers.Dense(1)(inputs))
    model.compile(keras.optimizers.SGD(SnapshotSchedule(SHORT)), "mse")
    watch = fits.Watch()
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT), watch)
    assert len(watch.weights) == 12
    expected = {2 * batch: watch.weights[batch] for batch in (4, 8, 12)}
    assert fits.same(fits.members(tmp_path / "run"), expected)


@pytest.mark.parametrize("other", [SHORT, CosineCycles(0.02, 48, 3)])
def test_another_schedule_is_refused(fits, tmp_path, other):
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 8, 0.5) if other is SHORT else SnapshotSchedule(other)
    with pytest.raises(ScheduleError, match="build"):
        fits.fit(fits.network(SHORT, rate), SnapshotCallback(tmp_path / "run", SHORT))
    assert not (tmp_path / "run").exists()


def test_updates_that_the_run_has_not_seen_are_refused_unless_the_schedule_begins_after_them(fits, tmp_path):
    model = fits.network(SHORT)
    fits.fit(model, epochs=1)
    with pytest.raises(ProtocolError, match=r"counted 6 updates.*begin=6"):
        fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT))
    model.compile(keras.optimizers.SGD(SnapshotSchedule(SHORT, begin=6)), "mse")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(6)
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT))
    assert steps(tmp_path / "run") == [8, 16, 24]


class Built(keras.Model):
    """Has a part with weights, and one that gets them in the first batch."""

    def __init__(self):
        super().__init__()
        self.body = keras.Sequential([keras.Input((4,)), layers.Dense(8)])
        self.head = layers.Dense(1)

    def call(self, x):
        return self.head(self.body(x))


def head(**options):
    model = keras.Sequential([layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse", **options)
    return model


@pytest.mark.parametrize("accumulation", [None, 3])
def test_a_model_that_is_built_in_part_is_followed_with_all_its_weights(fits, tmp_path, accumulation):
    model, watch = Built(), fits.Watch()
    model.compile(keras.optimizers.SGD(SnapshotSchedule(SHORT), gradient_accumulation_steps=accumulation), "mse")
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT, resume=False), watch, epochs=20)
    parts = accumulation or 1
    assert len(watch.weights) == 24 * parts
    assert len(watch.weights[1]) == 4  # kernel and bias of both
    assert fits.same(fits.members(tmp_path / "run"), {step: watch.weights[step * parts] for step in (8, 16, 24)})


def test_a_run_is_not_resumed_with_a_model_that_is_not_built(fits, tmp_path):
    callback = SnapshotCallback(tmp_path / "run", SHORT)
    with pytest.raises(InterruptedError):
        fits.fit(head(), callback, At(12, die))
    callback.close()
    with pytest.raises(DataError, match="build it first"):
        fits.fit(head(), SnapshotCallback(tmp_path / "run", SHORT))
    model = head()
    model.build((None, 4))
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT))
    assert steps(tmp_path / "run") == [8, 16, 24]


def test_a_model_that_is_not_built_must_not_be_past_a_snapshot_after_its_first_execution(fits, tmp_path):
    class Often(keras.Sequential):
        def train_step(self, data):
            for _ in range(8):
                super().train_step(data)
            return super().train_step(data)

    model = Often([layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    with pytest.raises(ProtocolError, match=r"whose 9 updates lead past the snapshot due after 8: build it first"):
        fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT))


def test_executions_that_do_not_fit_are_refused_before_a_model_is_built(fits, tmp_path):
    model = head(steps_per_execution=4)
    with pytest.raises(ProtocolError, match="due 8 batches from here"):
        fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT))
    assert not model.weights


def test_an_old_run_stays_where_a_new_one_is_refused(fits, tmp_path):
    model, cut = fits.network(SHORT), fits.network(SHORT, steps_per_execution=4)
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT))
    for one, message in ((model, "begin=24"), (cut, "due 8 batches from here")):
        with pytest.raises(ProtocolError, match=message):
            fits.fit(one, SnapshotCallback(tmp_path / "run", SHORT, resume=False))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert steps(tmp_path / "run") == [8, 16, 24]


def test_a_plain_rate_continues_in_its_own_run_and_begins_in_another(fits, tmp_path, unbroken):
    model = fits.network(SHORT, 0.7)
    for epochs in (1, 2):
        fits.fit(model, SnapshotCallback(tmp_path / "one", SHORT, resume=False), epochs=epochs)
    model.save(tmp_path / "model.keras")
    fits.fit(model, SnapshotCallback(tmp_path / "other", SHORT))
    model = keras.models.load_model(tmp_path / "model.keras")
    fits.fit(model, SnapshotCallback(tmp_path / "one", SHORT), epochs=1)
    assert fits.same(fits.members(tmp_path / "one"), unbroken)
    assert steps(tmp_path / "other") == [8, 16, 24]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "one", "other"]


def test_a_plain_rate_continues_also_if_the_optimizer_had_counted_before_the_run(fits, tmp_path, formula):
    watch, rates = fits.Watch(), [formula(step) for step in range(24)]
    model = shown(fits, 0.7)
    fits.fit(model, epochs=1)
    callback = SnapshotCallback(tmp_path / "run", SHORT)
    with pytest.raises(InterruptedError):
        fits.fit(model, callback, At(16, die))
    callback.close()
    fits.fit(shown(fits, 0.7), SnapshotCallback(tmp_path / "run", SHORT), watch)
    found = [float(weights[0].max()) for weights in watch.weights.values()]
    assert found == pytest.approx(rates[16:], abs=4e-7 * 0.02, rel=0)


def test_a_loop_of_ones_own_gives_its_schedule_the_accumulation_of_gradients(fits, tmp_path, formula):
    model = shown(fits, SnapshotSchedule(SHORT), gradient_accumulation_steps=2)
    run = KerasRun(tmp_path / "run", SHORT, model, model.optimizer, framework="keras")
    for batch in range(24):
        model.train_on_batch(fits.X, fits.Y)
        if run.call():
            run.look()
        if batch % 2:
            assert model.get_weights()[0].max() == pytest.approx(formula(batch // 2), rel=1e-5)
    run.close(exact=True)
    assert read_point(tmp_path / "run").state["place"]["step"] == 12


def test_a_callback_may_be_copied(fits, tmp_path, unbroken):
    fits.fit(fits.network(SHORT), copy.deepcopy(SnapshotCallback(tmp_path / "run", SHORT)))
    assert fits.same(fits.members(tmp_path / "run"), unbroken)


def test_a_number_is_no_program(tmp_path):
    with pytest.raises(ProtocolError, match=r"a schedule, such as .*, or a program .*; got 0\.1"):
        SnapshotCallback(tmp_path / "run", 0.1)


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("anew", [False, True])
def test_a_fit_that_died_leaves_the_directory_to_the_next(fits, tmp_path, unbroken, anew):
    model = fits.network(SHORT)
    callback = left = SnapshotCallback(tmp_path / "run", SHORT)
    with pytest.raises(InterruptedError):
        fits.fit(model, callback, At(12, die))
    if anew:
        callback = SnapshotCallback(tmp_path / "run", SHORT)
    fits.fit(model, callback, initial_epoch=2)  # continues with the model as it is
    assert fits.same(fits.members(tmp_path / "run"), unbroken)
    left.close()


def test_close_releases_the_directory(fits, tmp_path):
    callback = SnapshotCallback(tmp_path / "run", SHORT)
    with pytest.raises(InterruptedError):
        fits.fit(fits.network(SHORT), callback, At(12, die))
    with pytest.raises(StoreError, match="being written"):
        SnapshotStore(tmp_path / "run", "w")
    callback.close()
    SnapshotStore(tmp_path / "run", "w").close()
    assert read_point(tmp_path / "run").state["place"]["step"] == 12


def test_points_are_kept_in_between_if_asked(fits, tmp_path):
    points = []
    callback = SnapshotCallback(tmp_path / "run", SHORT, resume_every=5)

    def look(model):
        callback._run.recorder.position()  # waits for the file
        points.append(read_point(tmp_path / "run").state["place"]["step"])

    fits.fit(fits.network(SHORT), callback, *(At(batch, look) for batch in (5, 7, 10, 15, 16)))
    assert points == [5, 5, 10, 15, 16]


def test_a_loaded_model_resumes_where_it_was_saved(fits, tmp_path, unbroken):
    callback = SnapshotCallback(tmp_path / "run", SHORT)
    with pytest.raises(InterruptedError):
        fits.fit(
            fits.network(SHORT),
            callback,
            At(12, lambda model: model.save(tmp_path / "model.keras")),
            At(17, die),
        )
    callback.close()
    assert steps(tmp_path / "run") == [8, 16]
    watch = fits.Watch()
    model = keras.models.load_model(tmp_path / "model.keras")
    fits.fit(model, SnapshotCallback(tmp_path / "run", SHORT), watch, initial_epoch=2)
    assert len(watch.weights) == 12
    assert [*fits.members(tmp_path / "run")] == [8, 16, 24]
    assert fits.same({8: fits.members(tmp_path / "run")[8]}, {8: unbroken[8]})


def test_a_last_member_that_was_not_written_is_taken_from_the_backup(fits, tmp_path):
    class DieAtTheEnd(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 3:
                raise InterruptedError

    def callbacks():
        return SnapshotCallback(tmp_path / "run", SHORT), fits.backup(tmp_path), watch

    watch = fits.Watch()
    with pytest.raises(InterruptedError):
        fits.fit(fits.network(SHORT), *(first := callbacks()), DieAtTheEnd())
    first[0].close()
    with SnapshotStore(tmp_path / "run", "w") as store:
        store.truncate(2)
    fits.fit(fits.network(SHORT), *callbacks())
    assert len(watch.weights) == 24
    assert fits.same(fits.members(tmp_path / "run"), {step: watch.weights[step] for step in (8, 16, 24)})
    assert SnapshotStore(tmp_path / "run").stopped == "finished"


def test_a_backup_does_not_resume_with_another_program(fits, tmp_path):
    with pytest.raises(InterruptedError):
        fits.fit(fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT), fits.backup(tmp_path), At(17, die))
    other = CosineCycles(0.02, 24, 4)
    with pytest.raises(StoreError, match="another program"):
        fits.fit(fits.network(other), SnapshotCallback(tmp_path / "run", other), fits.backup(tmp_path))
    assert read_point(tmp_path / "run") is not None


def fresh(member):
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(1, kernel_initializer=keras.initializers.Constant(member))]
    )


@pytest.mark.parametrize(("method", "begins_with"), [("singlecycle", 2.0), ("star", None)])
def test_programs_that_restart_continue_from_other_weights(fits, tmp_path, method, begins_with):
    plan = program(method, lr=0.02, steps=24, cycles=3)
    model, watch = fresh(1), fits.Watch()
    model.compile(keras.optimizers.SGD(SnapshotSchedule(plan.schedule), momentum=0.9), "mse")
    fits.fit(model, watch, SnapshotCallback(tmp_path / "run", plan, init=fresh))
    found = fits.members(tmp_path / "run")
    assert fits.same(found, {step: watch.weights[step] for step in (8, 16, 24)})
    # The 9th update, by hand: plain descent, since the momentum was reset.
    kernel = found[8][0] if begins_with is None else np.full((4, 1), begins_with, "float32")
    bias = found[8][1] if begins_with is None else np.zeros(1, "float32")
    x, y = fits.X[8:12], fits.Y[8:12]  # the third batch of an epoch
    slope = 2 * (x @ kernel + bias - y) / len(x)
    np.testing.assert_allclose(watch.weights[9][0], kernel - 0.02 * x.T @ slope, rtol=1e-5)
    np.testing.assert_allclose(watch.weights[9][1], bias - 0.02 * slope.sum(0), rtol=1e-5)


def spoil(model):
    model.set_weights([np.full(np.shape(each), np.nan) for each in model.get_weights()])


def test_after_a_member_that_is_not_finite_the_next_fit_in_the_directory_begins_again(fits, tmp_path, unbroken):
    callback = SnapshotCallback(tmp_path / "run", SHORT)
    with pytest.raises(DivergedError, match="member 1 at update 8"):
        fits.fit(fits.network(SHORT), callback, At(7, spoil))
    fits.fit(fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT))
    assert fits.same(fits.members(tmp_path / "run"), unbroken)


def test_an_end_reported_in_another_thread_without_its_begin_is_refused(tmp_path):
    """A loop of one's own would continue and take nothing."""
    callback = SnapshotCallback(tmp_path / "run", SHORT)
    with (
        ThreadPoolExecutor() as other,
        pytest.raises(ProtocolError, match="on_train_batch_begin was not called before"),
    ):
        other.submit(callback.on_train_batch_end, 0).result()


def test_a_subclass_that_listens_to_the_ends_of_batches_is_called_in_keras_own_thread(tmp_path):
    class Listens(SnapshotCallback):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)

    assert SnapshotCallback(tmp_path / "run", SHORT).async_safe
    assert not Listens(tmp_path / "run", SHORT).async_safe


class Own(keras.Model):
    """Has a `compile` of its own and trains by the optimizer given there, as many of Keras' examples do."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        self.built = True

    def compile(self, g_optimizer):
        super().compile()
        self.g_optimizer = g_optimizer

    def call(self, x):
        return self.generator(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.g_optimizer.scale_loss(tf.reduce_mean(tf.square(self(x) - y)))
        self.g_optimizer.apply(tape.gradient(loss, self.generator.trainable_weights), self.generator.trainable_weights)
        return {"loss": loss}


def own_optimizers():
    yield keras.optimizers.SGD(SnapshotSchedule(SHORT))
    yield keras.optimizers.Adam(0.7)
    yield keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(SnapshotSchedule(SHORT)), initial_scale=4.0)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_model_that_trains_by_an_optimizer_of_its_own_is_refused_after_a_batch_with_the_cure(fits, tmp_path, number):
    model, watch = Own(), fits.Watch()
    model.compile([*own_optimizers()][number])
    with pytest.raises(
        ProtocolError, match=r"weights have moved, and rm_?sprop\w* has counted no update: pass optimizer="
    ):
        fits.fit(model, watch, SnapshotCallback(tmp_path / "run", SHORT))
    assert len(watch.weights) <= 1
    assert steps(tmp_path / "run") == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_optimizer_that_is_passed_is_the_one_that_counts_and_has_the_rate(fits, tmp_path, number, formula):
    model, watch = Own(), fits.Watch()
    model.compile(optimizer := [*own_optimizers()][number])
    fits.fit(model, watch, SnapshotCallback(tmp_path / "run", SHORT, optimizer=optimizer))
    assert len(watch.weights) == 24
    assert fits.same(fits.members(tmp_path / "run"), {step: watch.weights[step] for step in (8, 16, 24)})
    rates = [member.lr for member in SnapshotStore(tmp_path / "run").members]
    assert rates == pytest.approx([formula(step) for step in (7, 15, 23)])


@pytest.mark.parametrize(
    "other",
    [
        lambda: keras.callbacks.LearningRateScheduler(lambda epoch: 0.1),
        lambda: keras.callbacks.ReduceLROnPlateau("loss"),
        type("Mine", (keras.callbacks.ReduceLROnPlateau,), {}),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_another_callback_that_sets_the_rate_is_refused_before_anything_is_done(fits, tmp_path, other, before):
    callbacks, model = [SnapshotCallback(tmp_path / "run", SHORT)], fits.network(SHORT, 0.1)
    callbacks.insert(0 if before else 1, other())
    with pytest.raises(
        ProtocolError, match=r"SnapshotCallback and \w+ would both set the learning rate: leave the latt"
    ):
        fits.fit(model, *callbacks)
    assert not (tmp_path / "run").exists()
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1)


def test_an_optimizer_of_another_model_is_refused_before_the_first_batch(fits, tmp_path):
    model, other, watch = fits.network(SHORT), fits.network(SHORT), fits.Watch()
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ProtocolError, match=r"was built for variables that .* does not have, such as"):
        fits.fit(model, watch, SnapshotCallback(tmp_path / "run", SHORT, optimizer=other.optimizer))
    assert not watch.weights
    model.compile(other.optimizer, "mse")
    with pytest.raises(ProtocolError, match=r"was built for variables that .* does not have, such as"):
        fits.fit(model, watch, SnapshotCallback(tmp_path / "run", SHORT))
    assert not watch.weights


@pytest.mark.parametrize("name", ["Sequential", "Functional"])
def test_what_another_keras_has_made_is_refused_by_its_full_name(fits, tmp_path, name):
    other = type(name, (), {"__module__": "tf_keras.src.engine", "optimizer": None})()
    with pytest.raises(
        ProtocolError, match=rf"one Keras 3 model is followed, got tf_keras\.src\.engine\.{name}: build"
    ):
        SnapshotCallback(tmp_path / "run", SHORT).set_model(other)
    optimizer = type(name, (), {"__module__": "tf_keras.src.optimizers"})()
    with pytest.raises(
        ProtocolError, match=rf"one Keras 3 optimizer is followed, got tf_keras\.src\.optimizers\.{name}"
    ):
        fits.fit(fits.network(SHORT), SnapshotCallback(tmp_path / "run", SHORT, optimizer=optimizer))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_weights_of_a_type_that_no_file_holds_are_refused_by_name_before_the_first_batch(fits, tmp_path, dtype):
    class Scaled(layers.Layer):
        def build(self, shape):
            zeros = tf.cast(tf.zeros(3), dtype)
            self.scale = self.add_weight(shape=(3,), dtype=dtype, initializer=lambda *_, **__: zeros, name="scale")
            self.scale.trainable = False

        def call(self, x):
            return x

    model, watch = keras.Sequential([keras.Input((4,)), Scaled(), layers.Dense(1)]), fits.Watch()
    model.compile(keras.optimizers.SGD(SnapshotSchedule(SHORT)), "mse")
    with pytest.raises(StoreError, match=rf"scale.*{dtype}|{dtype}.*scale"):
        fits.fit(model, watch, SnapshotCallback(tmp_path / "run", SHORT))
    assert not watch.weights


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("mode", ["float8", "int8"])
def test_a_model_quantized_by_keras_is_kept_as_its_variables_are(fits, tmp_path, mode):
    model, watch = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(1)]), fits.Watch()
    model.layers[0].quantize(mode)
    model.compile(keras.optimizers.SGD(SnapshotSchedule(SHORT)), "mse")
    fits.fit(model, watch, SnapshotCallback(tmp_path / "run", SHORT))
    store = SnapshotStore(tmp_path / "run")
    found = {step: [array for _, array in sorted(store.load(step // 8).items())] for step in (8, 16, 24)}
    assert fits.same(found, {step: watch.weights[step] for step in (8, 16, 24)})


def test_a_relative_directory_is_meant_from_where_the_callback_was_made(fits, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    callback = SnapshotCallback("run", SHORT)
    fits.fit(fits.network(SHORT), callback, At(3, lambda model: monkeypatch.chdir(tmp_path / "elsewhere")))
    assert steps(tmp_path / "run") == [8, 16, 24]
    assert not [*(tmp_path / "elsewhere").iterdir()]
