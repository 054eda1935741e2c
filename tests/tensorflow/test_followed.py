"""What a run follows: the optimizer that trains the model, at the rate that was used; and what it hands over."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapcore import CosineCycles, CycleWarning, ProtocolError, StoreError
from snapcore.store import SnapshotStore
from snapcore_tensorflow.run import SnapshotRun
from snapcore_tensorflow.schedule import SnapshotSchedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
X = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)


def linear():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


def make_update(model, optimizer):
    optimizer.build(model.trainable_variables)

    @tf.function
    def update():
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(tf.reduce_mean(tf.square(model(X, training=True))))
        optimizer.apply(tape.gradient(loss, model.trainable_variables))

    return update


def members(directory):
    return SnapshotStore(directory).members


def loop(directory, model, optimizer, update, before=lambda step: None, **options):
    """Train to the end; `before` is called before every update."""
    with SnapshotRun(directory, CYCLES, model, optimizer, **options) as run:
        while not run.finished:
            before(run.updates)
            update()
            run.step()


@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_a_rate_that_something_else_sets_is_warned_of_once_and_recorded(tmp_path, kind):
    model, optimizer = linear(), kind(0.7)
    update = make_update(model, optimizer)
    with pytest.warns(CycleWarning, match=r"update 1 was done at the rate 0\.25, .*the schedule's is 0\.1") as caught:
        loop(tmp_path / "run", model, optimizer, update, lambda step: optimizer.learning_rate.assign(0.25))
    assert [warning.filename for warning in caught] == [__file__]
    assert [member.lr for member in members(tmp_path / "run")] == [0.25] * 3


@pytest.mark.exhaustive
def test_a_rate_that_is_set_at_a_trough_alone_is_warned_of_and_recorded_there(tmp_path):
    model, optimizer = linear(), keras.optimizers.SGD(0.7)
    update = make_update(model, optimizer)

    def before(step):
        if step == 7:
            optimizer.learning_rate = 0.5

    with pytest.warns(CycleWarning, match=r"update 8 was done at the rate 0\.5"):
        loop(tmp_path / "run", model, optimizer, update, before)
    rates = [member.lr for member in members(tmp_path / "run")]
    assert rates == pytest.approx([CYCLES(3), 0.5, CYCLES(11)])


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_runs_own_rate_is_never_warned_of(tmp_path, options, scaled):
    model, optimizer = linear(), keras.optimizers.SGD(0.7, **options)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0) if scaled else optimizer
    update = make_update(model, optimizer)
    loop(tmp_path / "run", model, optimizer, update, resume_every=5)
    assert [member.lr for member in members(tmp_path / "run")] == [CYCLES(step) for step in (3, 7, 11)]


def test_a_run_that_finishes_early_does_not_take_the_next_rate_for_the_last(tmp_path):
    model, optimizer = linear(), keras.optimizers.SGD(0.7)
    update = make_update(model, optimizer)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        for _ in range(6):
            update()
            run.step()
        run.finish("enough")
    assert [member.lr for member in members(tmp_path / "run")] == [CYCLES(3), CYCLES(5)]


@pytest.mark.parametrize("plain", [False, True])
def test_an_optimizer_that_trains_nothing_is_refused_after_the_first_update(tmp_path, plain):
    model, trains = linear(), keras.optimizers.SGD(0.1)
    idle = keras.optimizers.Adam(0.7 if plain else SnapshotSchedule(CYCLES), name="idle")
    update, done = make_update(model, trains), []
    with pytest.raises(ProtocolError, match=r"the weights have moved, and idle has counted no update: pass optimizer="):
        loop(tmp_path / "run", model, idle, update, done.append)
    assert done == [0]


@pytest.mark.parametrize("built_for", ["the other", "both"])
def test_an_optimizer_that_was_built_for_another_model_is_refused_at_the_start(tmp_path, built_for):
    old, new = linear(), linear()
    optimizer = keras.optimizers.SGD(SnapshotSchedule(CYCLES), name="foreign")
    optimizer.build([*(new.trainable_variables if built_for == "both" else []), *old.trainable_variables])
    before = new.get_weights()
    with pytest.raises(ProtocolError, match=r"foreign was built for variables that .* does not have, such as .*kernel"):
        SnapshotRun(tmp_path / "run", CYCLES, new, optimizer)
    assert not (tmp_path / "run").exists()
    assert all(np.array_equal(*both) for both in zip(new.get_weights(), before, strict=True))


def test_an_optimizer_of_a_part_of_the_model_is_followed_and_resumed(tmp_path):
    for name, ends in (("whole", [12]), ("run", [5, 12])):
        for end in ends:
            keras.utils.set_random_seed(0)
            frozen = keras.layers.Dense(3)
            model = keras.Sequential([keras.Input((3,)), frozen, keras.layers.Dense(2)])
            optimizer = keras.optimizers.Adam(SnapshotSchedule(CYCLES))
            frozen.trainable = False
            update = make_update(model, optimizer)
            frozen.trainable = True
            with SnapshotRun(tmp_path / name, CYCLES, model, optimizer) as run:
                while run.updates < end:
                    with tf.GradientTape() as tape:
                        loss = tf.reduce_mean(tf.square(model(X)))
                    part = model.layers[-1].trainable_variables
                    optimizer.apply(tape.gradient(loss, part), part)
                    run.step()
            del update
    for index in (1, 2, 3):
        whole, run = (SnapshotStore(tmp_path / name).load(index) for name in ("whole", "run"))
        assert all(np.array_equal(whole[key], run[key]) for key in whole)


@pytest.mark.parametrize("module", ["tf_keras.src.engine.sequential", "tensorflow_estimator.keras"])
def test_what_another_keras_has_made_is_refused_by_its_full_name(tmp_path, module):
    other = type("Sequential", (tf.Module,), {"__module__": module})
    optimizer = type("SGD", (), {"__module__": module})
    with pytest.raises(ProtocolError, match=rf"one Keras 3 model is followed, got {module}\.Sequential: build it with"):
        SnapshotRun(tmp_path / "run", CYCLES, other(), keras.optimizers.SGD(0.1))
    with pytest.raises(ProtocolError, match=rf"one Keras 3 optimizer is followed, got {module}\.SGD: build it with"):
        SnapshotRun(tmp_path / "run", CYCLES, linear(), optimizer())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_weights_of_a_type_that_no_file_holds_are_refused_by_name_at_the_start(tmp_path, dtype):
    class Small(keras.layers.Layer):
        def build(self, shape):
            zeros = tf.cast(tf.zeros(3), dtype)
            self.scale = self.add_weight(shape=(3,), dtype=dtype, initializer=lambda *_, **__: zeros, name="scale")

        def call(self, x):
            return x

    model = keras.Sequential([keras.Input((3,)), Small(), keras.layers.Dense(2)])
    with pytest.raises(StoreError, match=rf"scale.*{dtype}|{dtype}.*scale"):
        SnapshotRun(tmp_path / "run", CYCLES, model, keras.optimizers.SGD(SnapshotSchedule(CYCLES)))


def test_a_model_quantized_to_int8_keeps_its_weights_as_they_are(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    model.layers[0].quantize("int8")
    optimizer = keras.optimizers.SGD(SnapshotSchedule(CYCLES))
    optimizer.build(model.trainable_variables)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        while not run.finished:
            part = model.trainable_variables
            optimizer.apply([tf.ones_like(each) for each in part], part)
            run.step()
    kinds = {array.dtype for array in SnapshotStore(tmp_path / "run").load(3).values()}
    assert np.dtype(np.int8) in kinds


def test_members_are_handed_over_as_they_are_taken_and_their_metrics_are_recorded(tmp_path):
    model, optimizer, seen = linear(), keras.optimizers.SGD(0.7), []
    update = make_update(model, optimizer)

    def measure(snapshot):
        return {"norm": float(tf.norm(model.weights[0]))} if snapshot.index != 2 else None

    def take(snapshot):
        seen.append((snapshot.step, measure(snapshot)))

    loop(tmp_path / "run", model, optimizer, update, on_member=take, metrics=measure)
    assert [step for step, _ in seen] == [4, 8, 12]
    assert [(member.step, member.metrics) for member in members(tmp_path / "run")] == seen
    kernel = SnapshotStore(tmp_path / "run").load(3)["000/dense/kernel"]
    assert seen[2][1]["norm"] == pytest.approx(float(np.linalg.norm(kernel)))


def test_a_relative_directory_is_meant_from_where_the_run_was_made(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model, optimizer = linear(), keras.optimizers.SGD(0.7)
    update = make_update(model, optimizer)
    loop("run", model, optimizer, update, lambda step: monkeypatch.chdir(tmp_path / "elsewhere"))
    assert [member.step for member in members(tmp_path / "run")] == [4, 8, 12]
    assert not [*(tmp_path / "elsewhere").iterdir()]
