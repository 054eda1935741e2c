"""The rate as optax sees it: the core's, traced or not, alone or inside everything that optax builds around it."""

import math
import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from snapcore import CosineCycles, Cycles, CycleWarning, ScheduleError, StepDecay
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=60, cycles=3)
EVEN = CosineCycles(lr=0.1, steps=61, cycles=3, remainder="even")
SCHEDULES = [
    CYCLES,
    EVEN,
    CosineCycles(lr=0.1, steps=60, cycles=3, lr_min=0.01, warmup_steps=12),
    CosineCycles(lr=0.1, steps=62, cycles=5, lr_min=0.1, warmup_steps=1, remainder="even"),
    StepDecay(lr=0.1, steps=60),
    StepDecay(lr=0.1, steps=60, milestones=(), snapshots=3),
    Cycles("exponential", lr=0.1, steps=62, cycles=5, warmup_steps=1, remainder="even"),
    Cycles("linear", lr=0.1, steps=60, cycles=1),
    Cycles(lambda u, ops: ops.where(u < 0.5, 1 - u, ops.cos(math.pi * u) / 2 + 0.5), lr=0.1, steps=60, cycles=3),
]


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


def largest_error(seed, cases):
    """Trace many schedules at once, and return their largest distance from the core's rate, in shares of the peak."""
    draw = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CycleWarning)
        schedules = [some_schedule(draw) for _ in range(cases)]
    steps = [[draw.randrange(schedule.steps) for _ in range(8)] + [0, schedule.steps] for schedule in schedules]
    rates = jax.jit(lambda all_steps: [snapshot_schedule(s)(k) for s, k in zip(schedules, all_steps, strict=True)])
    traced = rates([jnp.array(some) for some in steps])
    assert {rate.dtype for rate in traced} == {jnp.result_type(float)}
    return max(
        abs(float(rate) - schedule(step)) / schedule.lr
        for schedule, some, found in zip(schedules, steps, traced, strict=True)
        for step, rate in zip(some, found, strict=True)
    )


@pytest.mark.exhaustive(keep=2)
@pytest.mark.parametrize("seed", range(10))
def test_traced_rates_are_the_cores_up_to_the_rounding_of_float32(seed):
    assert largest_error(seed, 50) <= 4e-7


def test_traced_rates_are_the_cores_up_to_the_rounding_of_float64_under_x64():
    with jax.enable_x64(True):
        assert largest_error(11, 50) <= 1e-15


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_integer_gives_exactly_the_cores_rate(schedule):
    rate = snapshot_schedule(schedule)
    for step in range(schedule.steps + 2):
        assert rate(step) == rate(np.int64(step)) == rate(np.int32(step)) == schedule(step)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_array_of_any_shape_gives_an_array_of_that_shape(schedule):
    rate, steps = snapshot_schedule(schedule), np.arange(60).reshape(3, 4, 5)
    expected = [schedule(step) for step in range(60)]
    for found in (rate(jnp.array(steps)), jax.jit(rate)(steps), jax.vmap(rate)(jnp.array(steps))):
        assert found.shape == steps.shape
        np.testing.assert_allclose(found.ravel(), expected, atol=4e-8)


def test_restarts_are_those_of_cosines_joined():
    """Peer: optax has the cosine and the join; the cycles are to be put together by hand."""
    by_hand = optax.join_schedules([optax.cosine_decay_schedule(0.1, 20)] * 3, [20, 40])
    rate = snapshot_schedule(CYCLES)
    for step in range(60):
        assert rate(step) == pytest.approx(float(by_hand(step)), abs=4e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8, np.uint32])
def test_counters_of_any_width_and_sign_are_understood(schedule, dtype):
    found = jax.jit(snapshot_schedule(schedule))(np.arange(60, dtype=dtype))
    np.testing.assert_allclose(found, [schedule(step) for step in range(60)], atol=4e-8)


def test_cycles_are_found_in_integers_where_float32_no_longer_counts():
    """20,000,001 is 20,000,000 in float32; Keras' CosineDecayRestarts casts before it divides."""
    long = CosineCycles(lr=1.0, steps=40_000_000, cycles=4_000_000, remainder="even")
    traced = jax.jit(snapshot_schedule(long))
    for step in (20_000_001, 20_000_009, 39_999_999):
        assert float(traced(step)) == pytest.approx((1 + math.cos(math.pi * (step % 10) / 10)) / 2, abs=4e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_negative_integer_raises_as_in_the_core(schedule):
    for step in (-1, np.int64(-1)):
        with pytest.raises(ScheduleError, match="0 or more, got -1"):
            snapshot_schedule(schedule)(step)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_traced_counts_out_of_range_are_clamped(schedule):
    rate = jax.jit(snapshot_schedule(schedule))
    assert float(rate(-7)) == pytest.approx(schedule(0), abs=4e-8)
    assert float(rate(10**6)) == pytest.approx(schedule(schedule.steps - 1), abs=4e-8)


@pytest.mark.parametrize("step", [1.0, np.float32(1), jnp.float32(1), "1"])
def test_what_is_no_integer_is_refused(step):
    with pytest.raises(ScheduleError, match="step must be an integer"):
        snapshot_schedule(CYCLES)(step)


@pytest.mark.exhaustive(keep=4)
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_traced_rates_are_weakly_typed_as_those_of_optax_are(schedule, x64):
    """The oracle is optax's own schedule: what it is multiplied with decides about the type."""
    with jax.enable_x64(x64):
        theirs = jax.eval_shape(optax.cosine_decay_schedule(0.1, 60), jnp.int32(3))
        for step in (jnp.int32(3), jnp.uint8(3), jnp.arange(6).reshape(2, 3)):
            for found in (jax.eval_shape(snapshot_schedule(schedule), step), snapshot_schedule(schedule)(step)):
                assert (found.dtype, found.weak_type, found.shape) == (theirs.dtype, theirs.weak_type, step.shape)
        vectorised = jax.vmap(snapshot_schedule(schedule))(jnp.arange(4))
        assert (vectorised.dtype, vectorised.weak_type) == (theirs.dtype, True)


OF_A_SCHEDULE = {
    "injected": lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9),
    "accumulating": lambda rate: optax.MultiSteps(optax.inject_hyperparams(optax.adamw)(learning_rate=rate), 2),
    "before a trace": lambda rate: optax.chain(optax.scale_by_schedule(rate), optax.trace(0.9)),
    "of the decay": lambda rate: optax.chain(optax.add_decayed_weights(rate), optax.trace(0.9)),
    "joined": lambda rate: optax.chain(
        optax.scale_by_schedule(optax.join_schedules([optax.constant_schedule(0.1), rate], [2])), optax.trace(0.9)
    ),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", OF_A_SCHEDULE)
def test_weights_and_moments_keep_a_narrow_type_so_that_updates_can_be_scanned(name, dtype):
    tx, params = OF_A_SCHEDULE[name](snapshot_schedule(CYCLES)), {"w": jnp.ones(3, dtype)}

    def update(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return (optax.apply_updates(params, updates), state), updates["w"]

    (params, _), updates = jax.lax.scan(update, (params, tx.init(params)), None, length=4)
    assert (params["w"].dtype, updates.dtype) == (dtype, dtype)


@pytest.mark.parametrize("steps", [2**31, 10**12])
def test_more_steps_than_the_counts_of_optax_hold_are_refused_when_the_schedule_is_made(steps):
    with pytest.raises(ScheduleError, match=rf"steps must be below 2,147,483,648, .* got {steps:,}: "):
        snapshot_schedule(CosineCycles(lr=0.1, steps=steps, cycles=4))
    longest = CosineCycles(lr=0.1, steps=2**31 - 1, cycles=4)
    assert float(jax.jit(snapshot_schedule(longest))(2**30)) == pytest.approx(longest(2**30), abs=4e-8)


def equations(jaxpr):
    inner = (value.jaxpr for eqn in jaxpr.eqns for value in eqn.params.values() if hasattr(value, "jaxpr"))
    return len(jaxpr.eqns) + sum(map(equations, inner))


def size(schedule):
    return equations(jax.make_jaxpr(snapshot_schedule(schedule))(jnp.int32(0)).jaxpr)


LARGEST = CosineCycles(lr=0.1, steps=1033, cycles=7, lr_min=0.01, warmup_steps=33, remainder="even")


@pytest.mark.parametrize("schedule", [*SCHEDULES, LARGEST])
def test_the_traced_function_is_a_score_of_operations_at_most(schedule):
    assert size(schedule) <= 20
    with jax.enable_x64(True):
        assert size(schedule) <= 20


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 7}, {"remainder": "even", "warmup_steps": 7}])
def test_its_size_does_not_depend_on_the_number_of_cycles(options):
    assert len({size(CosineCycles(0.1, 100_007, cycles, **options)) for cycles in (3, 30, 300, 3000)}) == 1


def rates_used(optimizer, gradients):
    """Train one weight under jit, and return by how much it moved per unit of gradient."""

    @jax.jit
    def update(weight, state, gradient):
        change, state = optimizer.update(gradient, state, weight)
        return optax.apply_updates(weight, change), state

    weight = jnp.zeros(())
    state, moved = optimizer.init(weight), []
    for gradient in gradients:
        before, (weight, state) = weight, update(weight, state, jnp.float32(gradient))
        moved.append(float(before - weight))
    return moved, state


def expected(steps):
    return pytest.approx([CYCLES(step) for step in steps], abs=2e-6)


def test_update_n_is_done_at_the_rate_of_step_n_minus_one():
    moved, _ = rates_used(optax.sgd(snapshot_schedule(CYCLES)), np.ones(62))
    assert moved == expected([*range(60), 59, 59])


def test_chained_and_masked_the_rate_is_the_rate():
    clipped = optax.chain(optax.clip(1.0), optax.sgd(snapshot_schedule(CYCLES)))
    assert rates_used(clipped, np.full(60, 5.0))[0] == expected(range(60))
    assert rates_used(optax.masked(clipped, mask=True), np.full(60, 5.0))[0] == expected(range(60))


def test_joined_after_a_warm_up_it_begins_at_its_own_first_update():
    joined = optax.join_schedules([optax.linear_schedule(0, 0.1, 10), snapshot_schedule(CYCLES)], [10])
    moved, _ = rates_used(optax.sgd(joined), np.ones(70))
    assert moved == pytest.approx([step / 100 for step in range(10)] + [CYCLES(step) for step in range(60)], abs=2e-6)


def test_injected_the_rate_can_be_read_from_the_state():
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=snapshot_schedule(CYCLES))
    for updates in (1, 20, 21):
        moved, state = rates_used(injected, np.ones(updates))
        assert moved == expected(range(updates))
        assert float(state.hyperparams["learning_rate"]) == pytest.approx(CYCLES(updates - 1), abs=4e-8)


def test_over_several_micro_batches_the_rate_moves_once_an_update():
    moved, _ = rates_used(optax.MultiSteps(optax.sgd(snapshot_schedule(CYCLES)), every_k_schedule=3), np.ones(63))
    assert moved[2::3] == expected(range(21))
    assert not any(moved[0::3] + moved[1::3])


def test_an_update_that_is_not_finite_and_left_out_does_not_count():
    careful = optax.apply_if_finite(optax.sgd(snapshot_schedule(CYCLES)), max_consecutive_errors=5)
    moved, _ = rates_used(careful, [1, np.nan, np.inf, 1, 1, np.nan, 1])
    assert moved == pytest.approx([CYCLES(0), 0, 0, CYCLES(1), CYCLES(2), 0, CYCLES(3)], abs=2e-6)
