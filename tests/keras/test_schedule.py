"""The rate as Keras sees it: the core's, in the optimizer, in the saved model, and refused where two disagree."""

import math
import random
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from snapcore import CosineCycles, Cycles, CycleWarning, ProtocolError, ScheduleError, StepDecay, program
from snapcore_keras.schedule import SnapshotSchedule, check_rate, give_schedule, given_schedule, set_accumulation

CYCLES = CosineCycles(lr=0.1, steps=60, cycles=3)


def some_schedule(draw):
    steps, lr = draw.choice((draw.randint(1, 60), draw.randint(61, 1_000_000))), 10 ** draw.uniform(-5, 1)
    if draw.random() < 0.2:
        return StepDecay(lr, steps, milestones=sorted(draw.random() for _ in range(draw.randint(0, 4))))
    warmup = draw.choice((0, draw.randrange(steps)))
    return CosineCycles(
        lr,
        steps,
        draw.randint(1, min(steps - warmup, 50)),
        lr_min=draw.choice((0.0, lr * draw.random())),
        warmup_steps=warmup,
        remainder=draw.choice(("paper", "even")),
    )


@pytest.mark.parametrize("seed", range(60))
def test_rates_are_the_cores_up_to_the_rounding_of_float32(seed):
    draw = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CycleWarning)
        schedule = some_schedule(draw)
    rate = SnapshotSchedule(schedule)
    for step in (0, schedule.steps - 1, schedule.steps, schedule.steps + 7, *(draw.randrange(schedule.steps),) * 4):
        assert abs(float(rate(step)) - schedule(step)) <= 4e-7 * schedule.lr


def two_parts(u, ops):
    return ops.where(u < 0.5, 1 - u, ops.cos(math.pi * u) / 2 + 0.5)


@pytest.mark.parametrize("shape", ["cosine", "linear", "exponential", two_parts])
@pytest.mark.parametrize("options", [{}, {"lr_min": 0.01, "warmup_steps": 7, "remainder": "even"}], ids=["", "options"])
def test_cycles_of_any_shape_have_the_cores_rates(shape, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CycleWarning)
        schedule = Cycles(shape, lr=0.1, steps=107, cycles=4, **options)
    rate = SnapshotSchedule(schedule)
    assert [float(rate(step)) for step in range(107)] == pytest.approx([*map(schedule, range(107))], abs=1e-7)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_a_count_of_either_width_is_understood_as_a_variable_and_as_a_tensor(dtype):
    rate = SnapshotSchedule(CYCLES)
    for count in (keras.Variable(25, dtype=dtype, trainable=False), ops.convert_to_tensor(25, dtype)):
        assert float(rate(count)) == pytest.approx(0.05 * (math.cos(math.pi * 5 / 20) + 1), rel=1e-6)


def test_cycles_are_found_in_integers_where_float32_no_longer_counts():
    """float32 has no 20,000,001, which `CosineDecayRestarts` would need."""
    rate = SnapshotSchedule(CosineCycles(lr=0.2, steps=24_000_000, cycles=24_000))
    exact = [0.1 * (math.cos(math.pi * k / 1000) + 1) for k in (999, 0, 1)]
    found = [float(rate(step)) for step in (19_999_999, 20_000_000, 20_000_001)]
    assert found == pytest.approx(exact, abs=1e-7)


def test_steps_before_the_beginning_hold_the_first_rate_and_after_the_end_the_last():
    rate = SnapshotSchedule(CYCLES, begin=100)
    assert [float(rate(step)) for step in (0, 100, 159, 500)] == pytest.approx(
        [CYCLES(0), CYCLES(0), CYCLES(59), CYCLES(59)], rel=1e-5
    )


def test_micro_batches_of_one_update_have_its_rate():
    rate = SnapshotSchedule(CYCLES, gradient_accumulation_steps=3)
    assert [float(rate(step)) for step in range(9)] == pytest.approx([CYCLES(k // 3) for k in range(9)], rel=1e-5)


@pytest.mark.parametrize("options", [{"begin": -1}, {"gradient_accumulation_steps": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ScheduleError, match="begin must be 0 or more and gradient_accumulation_steps 1 or more, got"):
        SnapshotSchedule(CYCLES, **options)


def test_a_saved_model_has_its_schedule_its_count_and_its_velocities(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(SnapshotSchedule(CYCLES, begin=0), momentum=0.9), "mse")
    x, y = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)
    for _ in range(25):
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert float(loaded.optimizer.learning_rate) == pytest.approx(CYCLES(25), rel=1e-5)
    for each in (model, loaded):
        each.train_on_batch(x, y)
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_updates_move_weights_by_the_rate_of_the_formula():
    weight = keras.Variable(np.float32(0))
    optimizer = keras.optimizers.SGD(SnapshotSchedule(CYCLES))
    optimizer.build([weight])
    moved = []
    for _ in range(60):
        before = float(weight.numpy())
        optimizer.apply([ops.ones(())], [weight])
        moved.append(before - float(weight.numpy()))
    wanted = [0.05 * (math.cos(math.pi * (step % 20) / 20) + 1) for step in range(60)]
    assert moved == pytest.approx(wanted, abs=1e-6)


def test_an_optimizer_of_the_same_cycles_is_recognized_also_within_one_that_scales_the_loss():
    for wrap in (lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer):
        assert check_rate(wrap(keras.optimizers.SGD(SnapshotSchedule(CYCLES))), CYCLES).cycles == CYCLES
        assert check_rate(wrap(keras.optimizers.SGD(0.1)), CYCLES) is None


@pytest.mark.parametrize(
    ("rate", "options", "message"),
    [
        (keras.optimizers.schedules.CosineDecay(0.1, 60), {}, "a schedule of its own, CosineDecay: build it with"),
        (SnapshotSchedule(CosineCycles(0.1, 80, 4)), {}, "steps=80, cycles=4.*steps=60, cycles=3"),
        (
            SnapshotSchedule(CYCLES, gradient_accumulation_steps=2),
            {"gradient_accumulation_steps": 4},
            "accumulates 4 .* counts 2: .*gradient_accumulation_steps=4",
        ),
    ],
)
def test_a_schedule_that_does_not_agree_is_refused_with_the_cure(rate, options, message):
    optimizer = keras.optimizers.SGD(rate, **options)
    assert not set_accumulation(optimizer)
    with pytest.raises(ScheduleError, match=message):
        check_rate(optimizer, CYCLES)


def again(optimizer):
    return type(optimizer).from_config(optimizer.get_config())


def test_a_schedule_learns_from_its_optimizer_how_many_gradients_make_an_update():
    bare = SnapshotSchedule(CYCLES, begin=2)
    optimizers = [again(keras.optimizers.SGD(bare, gradient_accumulation_steps=parts)) for parts in (2, 3)]
    for parts, optimizer in zip((2, 3), optimizers, strict=True):
        assert set_accumulation(optimizer)
        assert not set_accumulation(optimizer)
        rate = check_rate(again(optimizer), CYCLES)
        expected = [CYCLES(max(0, step // parts - 2)) for step in range(12)]
        assert [float(rate(step)) for step in range(12)] == pytest.approx(expected, rel=1e-5)
    assert bare.gradient_accumulation_steps is None  # one schedule may serve several optimizers
    assert float(bare(3)) == pytest.approx(CYCLES(1), rel=1e-5)


def test_a_schedule_learns_nothing_once_updates_were_counted():
    optimizer = keras.optimizers.SGD(SnapshotSchedule(CYCLES), gradient_accumulation_steps=2)
    optimizer._iterations.assign(2)
    assert not set_accumulation(optimizer)
    with pytest.raises(ScheduleError, match=r"new optimizer with .*gradient_accumulation_steps=2"):
        check_rate(optimizer, CYCLES)


def test_a_schedule_given_instead_of_a_plain_rate_is_known_as_that_after_saving():
    optimizer = keras.optimizers.SGD(0.1)
    give_schedule(optimizer, CYCLES, 7)
    given = given_schedule(again(optimizer))
    assert (given.cycles, given.begin) == (CYCLES, 7)
    assert given_schedule(keras.optimizers.SGD(SnapshotSchedule(CYCLES))) is None


def test_a_schedule_of_a_program_is_the_programs_and_of_a_number_none():
    plan = program("star", lr=0.1, steps=60, cycles=3)
    assert SnapshotSchedule(plan).cycles == CYCLES
    with pytest.raises(ProtocolError, match=r"a schedule, such as .*, or a program .*; got 0\.1"):
        SnapshotSchedule(0.1)


def test_a_function_as_a_rate_is_refused():
    def constant():
        return 0.1

    with pytest.raises(ScheduleError, match="a schedule of its own, constant"):
        check_rate(keras.optimizers.SGD(constant), CYCLES)
