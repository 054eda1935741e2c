"""A run around a loop of one's own: what counts as an update, the rate it gets, what is kept, and how it ends."""

import json
import math
import socket
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from snapcore import CosineCycles, CycleWarning, DataError, DivergedError, ProtocolError, ScheduleError
from snapcore.store import SnapshotStore
from snapcore_keras.state import Copy, named_weights
from snapcore_tensorflow.run import SnapshotRun
from snapcore_tensorflow.schedule import SnapshotSchedule

from ..forked import Forked

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
X = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def linear(dtype="float32"):
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype=dtype)])


def normalised():
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((3,)), *layers])


def sgd(rate=None, **options):
    """An optimizer with the matching schedule, or with a plain rate."""
    return keras.optimizers.SGD(SnapshotSchedule(CYCLES) if rate is None else rate, momentum=0.9, **options)


def make_update(model, optimizer, **options):
    """One real update as a function that is traced once, on `X` times a number."""
    optimizer.build(model.trainable_variables)

    @tf.function(**options)
    def update(scale):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.cast(model(X * scale, training=True), tf.float32)))
            loss = optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(loss, model.trainable_variables))

    return lambda scale=1.0: update(tf.constant(scale, tf.float32))


def by_hand(model):
    return [weight.numpy().tobytes() for weight in model.weights]


def on_disk(directory, index):
    return [array.tobytes() for array in SnapshotStore(directory).load(index).values()]


def rate(step):
    """Equation 2 of the paper for three cycles of four updates."""
    return 0.1 / 2 * (math.cos(math.pi * (step % 4) / 4) + 1)


def steps(directory):
    return [member.step for member in SnapshotStore(directory).members]


def train(directory, model, optimizer, update=None):
    """Train to the end, and copy by hand what each snapshot should hold."""
    update, copies = update or make_update(model, optimizer), []
    with SnapshotRun(directory, CYCLES, model, optimizer) as run:
        while not run.finished:
            update()
            if run.updates in CYCLES.snapshot_steps:
                copies.append(by_hand(model))
            run.step()
    return copies


@pytest.mark.parametrize("plain", [None, 0.7])
def test_bfloat16_weights_come_to_disk_as_they_are(tmp_path, plain):
    copies = train(tmp_path / "run", linear("bfloat16"), sgd(plain))
    assert [on_disk(tmp_path / "run", index) for index in (1, 2, 3)] == copies
    assert len({str(copy) for copy in copies}) == 3
    assert {array.dtype for array in SnapshotStore(tmp_path / "run").load(1).values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("plain", [None, 0.7])
def test_the_run_does_the_updates_of_a_plain_loop_at_the_papers_rates(tmp_path, plain):
    model, mirror = normalised(), normalised()
    mirror.set_weights(model.get_weights())
    train(tmp_path / "run", model, sgd(plain))
    optimizer = sgd(0.1)
    update = make_update(mirror, optimizer)
    for step in range(12):
        optimizer.learning_rate = rate(step)
        update()
    for ours, plain_loops in zip(model.get_weights(), mirror.get_weights(), strict=True):
        np.testing.assert_allclose(ours, plain_loops, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.AdamW])
def test_a_plain_rate_is_set_before_every_update_of_a_function_that_is_traced_already(tmp_path, kind):
    model, optimizer, seen = linear(), kind(0.7), []
    update = make_update(model, optimizer)
    update()
    begun = optimizer.iterations.numpy()
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        while not run.finished:
            seen.append(float(optimizer.learning_rate))
            assert run.lr == pytest.approx(seen[-1], rel=1e-6)
            update()
            run.step()
    assert seen == pytest.approx([rate(step) for step in range(12)], rel=1e-6)
    assert (begun, optimizer.iterations.numpy()) == (1, 13)


@pytest.mark.parametrize("plain", [None, 0.7])
def test_accumulated_micro_batches_do_not_count_and_the_rate_is_the_updates(tmp_path, plain):
    """Users ask for cycles that are right under gradient accumulation."""
    chosen = SnapshotSchedule(CYCLES, gradient_accumulation_steps=3) if plain is None else plain
    model, optimizer, seen = linear(), sgd(chosen, gradient_accumulation_steps=3), []
    update = make_update(model, optimizer)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        for micro_batch in range(36):
            assert run.updates == micro_batch // 3
            seen.append(float(optimizer.learning_rate))
            update()
            run.step()
        assert run.finished
    assert seen[2::3] == pytest.approx([rate(step) for step in range(12)], rel=1e-6)
    assert steps(tmp_path / "run") == [4, 8, 12]


@pytest.mark.parametrize("plain", [None, 0.7])
def test_an_update_that_a_loss_scaler_skips_does_not_count_and_the_rate_stays(tmp_path, plain):
    model, inner, seen = linear(), sgd(plain), []
    update = make_update(model, keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0))
    with SnapshotRun(tmp_path / "run", CYCLES, model, inner) as run:
        for attempt in range(8):
            seen.append(float(inner.learning_rate))
            update(np.inf if attempt % 2 else 1.0)
            run.step()
        assert run.updates == 4
    assert seen == pytest.approx([rate(step) for step in (0, 1, 1, 2, 2, 3, 3, 4)], rel=1e-6)
    assert steps(tmp_path / "run") == [4]


def test_an_optimizer_that_scales_the_loss_is_followed_and_resumed_itself(tmp_path):
    model = linear()
    optimizer = keras.optimizers.LossScaleOptimizer(sgd(0.7), initial_scale=4.0)
    train(tmp_path / "run", model, optimizer)
    assert steps(tmp_path / "run") == [4, 8, 12]


def several(update, number):
    def chunk():
        for _ in range(number):
            update()

    return tf.function(chunk)


@pytest.mark.parametrize("number", [2, 4])
def test_several_updates_of_one_function_all_count_with_a_schedule(tmp_path, number):
    models = [linear(), linear()]
    models[1].set_weights(models[0].get_weights())
    train(tmp_path / "single", models[0], sgd())
    optimizer = sgd()
    chunk = several(make_update(models[1], optimizer), number)
    with SnapshotRun(tmp_path / "run", CYCLES, models[1], optimizer) as run:
        for done in range(number, 13, number):
            chunk()
            run.step()
            assert run.updates == done
    assert [on_disk(tmp_path / "run", index) for index in (1, 2, 3)] == [
        on_disk(tmp_path / "single", index) for index in (1, 2, 3)
    ]


@pytest.mark.parametrize("singly", [0, 2])
def test_several_updates_at_one_plain_rate_are_refused_with_the_cure(tmp_path, singly):
    model, optimizer = linear(), sgd(0.7)
    update = make_update(model, optimizer)
    chunk = several(update, 2)

    def loop():
        with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
            for each in [update] * singly + [chunk] * 5:
                each()
                run.step()

    with pytest.raises(
        ProtocolError, match=r"updates were done in . calls of run.step\(\).*SnapshotSchedule\(cycles\)"
    ):
        loop()
    assert steps(tmp_path / "run") == []


def test_late_calls_are_warned_of_and_recorded_with_the_true_step(tmp_path):
    model, optimizer = linear(), sgd()
    update = make_update(model, optimizer)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        for _ in range(6):
            update()
        with pytest.warns(CycleWarning, match="member 1 was due after update 4 and is taken 2 updates late") as caught:
            run.step()
        assert [one.filename for one in caught] == [__file__]
        assert run.lr == CYCLES(6)
    (member,) = SnapshotStore(tmp_path / "run").members
    assert (member.step, member.due, member.lr) == (6, 4, CYCLES(5))


def test_between_boundaries_the_optimizers_count_is_not_read(tmp_path, monkeypatch):
    """Reading it waits for the update that is being done."""
    long = CosineCycles(lr=0.1, steps=60, cycles=2)
    model, optimizer = linear(), sgd(0.7)
    update = make_update(model, optimizer)
    with SnapshotRun(tmp_path / "run", long, model, optimizer) as run:
        counted, reads = run._run._read_count, []
        monkeypatch.setattr(run._run, "_read_count", lambda: reads.append(1) or counted())
        for step in range(1, 30):
            update()
            run.step()
            assert len(reads) <= 2, step  # those of the first call
        update()
        run.step()
    assert steps(tmp_path / "run") == [30]


def test_a_call_within_a_function_is_refused_since_it_would_be_traced_away(tmp_path):
    model, optimizer = linear(), sgd()
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run, pytest.raises(ProtocolError, match="outside"):
        tf.function(run.step, autograph=False)()


@pytest.mark.parametrize("plain", [None, 0.7])
def test_closing_a_run_again_that_an_exception_in_the_loop_has_closed_does_nothing(tmp_path, plain, caplog):
    model, optimizer = linear(), sgd(plain)
    update = make_update(model, optimizer)
    run = SnapshotRun(tmp_path / "run", CYCLES, model, optimizer)

    def interrupted_loop():
        with run:
            for _ in range(3):
                update()
                run.step()
            update()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_loop()
    run.close()
    run.close()
    assert caplog.text.count("left after 3 of 12 updates") == 1
    assert steps(tmp_path / "run") == []


@pytest.mark.parametrize("plain", [None, 0.7])
@pytest.mark.parametrize("end", [lambda run: run.finish("enough"), lambda run: run.close()])
def test_updates_after_the_end_are_not_the_runs(tmp_path, plain, end):
    model, optimizer = linear(), sgd(plain)
    update = make_update(model, optimizer)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        for _ in range(5):
            update()
            run.step()
        end(run)
        update()
        assert (run.updates, run.lr) == (5, CYCLES(5))
        if run.finished:
            with pytest.raises(ProtocolError, match="stopped after 5 updates"):
                run.step()
    update()
    assert run.updates == 5


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}])
@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_a_copy_is_not_changed_by_updates_that_come_before_it_is_written(kind, options):
    model = linear()
    update = make_update(model, kind(0.1), **options)
    update()
    expected, copy = by_hand(model), Copy(named_weights(model))
    update()
    model.weights[0].assign_add(np.ones((3, 2)))
    model.weights[1].assign(np.zeros(2))
    assert [array.tobytes() for array in copy.resolve().values()] == expected
    assert by_hand(model) != expected


def test_batch_statistics_are_part_of_a_snapshot_and_random_states_are_not(tmp_path):
    layers = [keras.layers.Dropout(0.5), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((3,)), *layers])
    train(tmp_path / "run", model, sgd())
    names = [name.split("/")[-1] for name in SnapshotStore(tmp_path / "run").load(3)]
    assert names == ["gamma", "beta", "moving_mean", "moving_variance"]


def test_weights_that_are_not_finite_become_no_member_and_the_members_before_stay(tmp_path):
    model, optimizer = linear(), sgd()
    update = make_update(model, optimizer)
    run = SnapshotRun(tmp_path / "run", CYCLES, model, optimizer)
    for step in range(8):
        update(np.nan if step == 7 else 1.0)
        run.step()
    with pytest.raises(DivergedError, match="member 2 at update 8"):
        run.close()
    run.close()
    store = SnapshotStore(tmp_path / "run")
    assert ([member.index for member in store.members], store.stopped) == ([1], None)


def test_another_schedule_than_the_runs_is_refused(tmp_path):
    model = linear()
    others = {
        "has a schedule of its own, CosineDecay": keras.optimizers.schedules.CosineDecay(0.1, 12),
        "build both with the same cycles": SnapshotSchedule(CosineCycles(lr=0.2, steps=12, cycles=3)),
    }
    for message, other in others.items():
        with pytest.raises(ScheduleError, match=message):
            SnapshotRun(tmp_path / "run", CYCLES, model, keras.optimizers.SGD(other))
    assert not (tmp_path / "run").exists()


def test_an_optimizer_whose_schedule_is_further_than_the_run_is_refused_with_the_cure(tmp_path):
    model, optimizer = linear(), sgd()
    make_update(model, optimizer)()
    with pytest.raises(ProtocolError, match=r"begin=1"):
        SnapshotRun(tmp_path / "run", CYCLES, model, optimizer)


def test_what_is_no_built_keras_model_or_no_keras_optimizer_is_refused(tmp_path):
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    with pytest.raises(DataError, match="has no weights yet: build it first"):
        SnapshotRun(tmp_path / "run", CYCLES, unbuilt, sgd())
    with pytest.raises(ProtocolError, match=r"one Keras 3 model is followed, got .*Variable"):
        SnapshotRun(tmp_path / "run", CYCLES, tf.Variable(1.0), sgd())
    with pytest.raises(ProtocolError, match="one Keras 3 optimizer is followed, got list"):
        SnapshotRun(tmp_path / "run", CYCLES, linear(), [sgd(), sgd()])
    assert not (tmp_path / "run").exists()


def start_mirrored(folder, number=0, **environment):
    """Start `mirrored_loop.py` in a process of its own."""
    script, log = Path(__file__).with_name("mirrored_loop.py"), folder / f"log {number}"
    return Forked(script, folder, log=log, strict=True, OMP_NUM_THREADS="1", **environment)


def said(process):
    assert process.wait() == 0, process.errors
    return process.output


@pytest.mark.exhaustive
def test_on_two_mirrored_devices_members_and_a_resumed_run_are_those_of_one_device(tmp_path):
    said(start_mirrored(tmp_path))
    for name in ("schedule", "plain"):
        for index in (1, 2, 3):
            mirrored, resumed, single = (
                SnapshotStore(tmp_path / f"{name} {how}").load(index) for how in ("mirrored", "resumed", "single")
            )
            assert [array.tobytes() for array in resumed.values()] == [array.tobytes() for array in mirrored.values()]
            for key in single:
                np.testing.assert_allclose(mirrored[key], single[key], rtol=1e-4, atol=1e-5)


def test_two_workers_write_one_run_together_and_continue_with_the_same_fresh_weights(tmp_path):
    """Users report that every worker writes, and that Keras' own `fit` fails on several workers (keras #20585)."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in listening]
    for each in listening:
        each.close()
    workers = [
        start_mirrored(
            tmp_path,
            index,
            TF_CONFIG=json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}),
        )
        for index in range(2)
    ]
    try:
        digests = [said(worker) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert digests[0] == digests[1]
    store = SnapshotStore(tmp_path / "run")
    assert ([member.step for member in store.members], store.stopped) == ([4, 8, 12], "finished")
    store.verify()
    logs = ["log 0", "log 0.errors", "log 1", "log 1.errors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*logs, "run"]
