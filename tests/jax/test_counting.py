"""Which count is that of the updates: a replicated one, one of several, one that an optimizer keeps for itself."""

import functools
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from flax import nnx

from snapcore import CosineCycles, ProtocolError
from snapcore.store import SnapshotStore
from snapcore_jax.counting import optimizer_name, read_count, read_other_counts
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
RATE = snapshot_schedule(CYCLES)
PARAMS = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}
ONES = jax.tree.map(jnp.ones_like, PARAMS)


def steps(directory):
    return [member.step for member in SnapshotStore(directory).members]


@functools.partial(jax.jit, static_argnums=0)
def update(tx, params, state):
    updates, state = tx.update(ONES, state, params)
    return optax.apply_updates(params, updates), state


def gan(directory, critic_updates, **options):
    """Train a generator at the schedule's rates, and its critic at others, so many times as often."""
    generator, critic = optax.sgd(RATE), optax.adam(optax.linear_schedule(0, 1e-3, 9))
    params, rest, done = PARAMS, (generator.init(PARAMS), critic.init(PARAMS)), 0
    with SnapshotRun(directory, CYCLES, **options) as run:
        params, rest = run.start(params, rest)
        while not run.finished:
            state, other = rest
            for _ in range(critic_updates):
                _, other = update(critic, params, other)
            params, state = update(generator, params, state)
            done += 1
            params, rest = run.step(params, (state, other))
    return done


@pytest.mark.parametrize("critic_updates", [2, 5])
def test_of_two_optimizers_that_count_differently_neither_is_chosen(tmp_path, critic_updates):
    refused = rf"have counted \[1, {critic_updates}\] updates: pass count=, a function from rest .*count=None"
    with pytest.raises(ProtocolError, match=refused):
        gan(tmp_path / "run", critic_updates)
    assert steps(tmp_path / "run") == []


@pytest.mark.parametrize("count", [lambda rest: rest[0][1].count, lambda rest: int(rest[0][1].count), None])
def test_the_one_that_is_meant_can_be_named_or_calls_be_counted(tmp_path, count):
    assert gan(tmp_path / "run", 5, count=count) == 12
    assert steps(tmp_path / "run") == [4, 8, 12]


def test_two_optimizers_that_count_alike_need_no_name(tmp_path):
    assert gan(tmp_path / "run", 1) == 12


def test_counts_that_differ_already_at_the_start_are_refused_there(tmp_path):
    _, ahead = update(optax.sgd(RATE), PARAMS, optax.sgd(RATE).init(PARAMS))
    with SnapshotRun(tmp_path / "run", CYCLES) as run, pytest.raises(ProtocolError, match=r"have counted \[0, 1\]"):
        run.start(PARAMS, (optax.sgd(RATE).init(PARAMS), ahead))


@pytest.mark.parametrize("count", [lambda rest: jnp.array([1, 2]), lambda rest: 0.5, lambda rest: jnp.zeros(0, int)])
def test_a_count_that_is_not_one_integer_is_refused(tmp_path, count):
    refused = pytest.raises(ProtocolError, match="the count of updates must be one integer, got")
    with SnapshotRun(tmp_path / "run", CYCLES, count=count) as run, refused:
        run.start(PARAMS, optax.sgd(RATE).init(PARAMS))


@pytest.mark.parametrize("tx", [optax.adam(RATE), optax.MultiSteps(optax.sgd(RATE), 3)])
def test_a_count_that_is_replicated_is_read_once(tx):
    _, state = update(tx, PARAMS, tx.init(PARAMS))
    alone = read_count(state)
    assert read_count(jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), state)) == alone
    with pytest.raises(ProtocolError, match="must be one integer"):
        read_count(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), state))


OVER_DEVICES = """
import sys, jax, jax.numpy as jnp, optax
from flax.jax_utils import replicate
from snapcore import CosineCycles
from snapcore.store import SnapshotStore
from snapcore_jax import SnapshotRun, snapshot_schedule

cycles = CosineCycles(lr=0.1, steps=12, cycles=3)
tx = optax.MultiSteps(optax.inject_hyperparams(optax.sgd)(learning_rate=snapshot_schedule(cycles)), 2)
params = jnp.ones(3)
params, state = replicate(params), replicate(tx.init(params))

@jax.pmap
def update(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

calls = 0
with SnapshotRun(sys.argv[1], cycles) as run:
    params, state = run.start(params, state)
    for _ in run.batches([0]):
        params, state = run.step(*update(params, state))
        calls += 1
print(jax.device_count(), calls, [(m.step, m.lr == cycles(m.step - 1)) for m in SnapshotStore(sys.argv[1]).members])
"""


def test_under_pmap_the_updates_of_one_device_count(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    script = tmp_path / "pmapped.py"
    script.write_text(OVER_DEVICES)
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "2 24 [(4, True), (8, True), (12, True)]", done.stderr


class OwnState(NamedTuple):
    count: jax.Array
    velocity: dict


def own_optimizer():
    """What a user writes who does not find it in optax."""

    def init(params):
        return OwnState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        velocity = jax.tree.map(lambda old, new: 0.9 * old - 0.1 * new, state.velocity, grads)
        return velocity, OwnState(state.count + 1, velocity)

    return optax.GradientTransformation(init, update)


KEEPING_THEIR_OWN = {
    "a user's": own_optimizer(),
    "prodigy": optax.contrib.prodigy(RATE),
    "schedule-free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9),
    "adam": optax.adam(0.1),
    "lion": optax.lion(0.1),
}


@pytest.mark.parametrize("name", KEEPING_THEIR_OWN)
def test_an_optimizer_that_counts_for_itself_is_compared_with_the_calls(tmp_path, name):
    tx = KEEPING_THEIR_OWN[name]
    params, state = PARAMS, tx.init(PARAMS)
    assert (read_count(state), len(read_other_counts(state))) == (None, 1)
    with SnapshotRun(tmp_path / "run", CYCLES, rate=CYCLES) as run:
        params, state = run.start(params, state)
        for _ in range(12):
            params, state = run.step(*update(tx, params, state))
    assert (run.finished, steps(tmp_path / "run")) == (True, [4, 8, 12])


@pytest.mark.parametrize("name", KEEPING_THEIR_OWN)
def test_where_the_calls_are_not_its_updates_they_are_refused_at_once(tmp_path, name):
    tx = KEEPING_THEIR_OWN[name]

    def loop():
        params, state = PARAMS, tx.init(PARAMS)
        with SnapshotRun(tmp_path / "run", CYCLES, rate=CYCLES) as run:
            params, state = run.start(params, state)
            for _ in range(4):  # as in a compiled loop of four
                params, state = update(tx, params, state)
            run.step(params, state)

    with pytest.raises(ProtocolError, match=r"1 calls .* has counted 4 updates: pass count="):
        loop()
    assert steps(tmp_path / "run") == []


def test_named_its_own_count_is_followed(tmp_path):
    tx = KEEPING_THEIR_OWN["prodigy"]
    params, state = PARAMS, tx.init(PARAMS)
    with SnapshotRun(tmp_path / "run", CYCLES, count=lambda rest: rest.count, rate=CYCLES) as run:
        params, state = run.start(params, state)
        for done in range(4, 13, 4):
            for _ in range(4):
                params, state = update(tx, params, state)
            params, state = run.step(params, state)
            assert run.updates == done
    assert steps(tmp_path / "run") == [4, 8, 12]


def test_what_apply_if_finite_leaves_out_is_not_counted_as_a_call_either(tmp_path):
    tx = optax.apply_if_finite(optax.adam(0.1), 100)

    def loop():
        params, state = PARAMS, tx.init(PARAMS)
        with SnapshotRun(tmp_path / "run", CYCLES, rate=CYCLES) as run:
            params, state = run.start(params, state)
            params, state = run.step(*update(tx, params, state))
            _, state = tx.update(jax.tree.map(lambda leaf: leaf * jnp.nan, ONES), state, params)
            params, state = run.step(params, state)
            for _ in range(10):
                params, state = run.step(*update(tx, params, state))

    with pytest.raises(ProtocolError, match=r"3 calls .* has counted 2 updates"):
        loop()
    assert steps(tmp_path / "run") == []


def forgetful_loop(params, state):
    new, _ = update(optax.sgd(RATE), params, state)
    return new, state


@jax.jit
def forgetful_update(params, state):
    updates, _ = optax.sgd(RATE).update(ONES, state)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("forgetful", [forgetful_loop, forgetful_update])
def test_an_optimizers_state_that_no_update_has_touched_is_refused_at_the_first_step(tmp_path, forgetful):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(PARAMS, optax.sgd(RATE).init(PARAMS))
        refused = r"state in `rest` has counted no update: give run\.step the new state that the update returned"
        with pytest.raises(ProtocolError, match=refused):
            run.step(*forgetful(params, state))


def test_a_step_that_left_everything_out_or_trained_something_else_is_none(tmp_path):
    """A loss scaler skips, and a critic has updates of its own: neither is an error."""
    tx = optax.sgd(RATE)
    params, state = {"mine": PARAMS, "other": jnp.ones(3)}, tx.init(PARAMS)
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(params, state)
        params, state = run.step(params, state)
        params, state = run.step({**params, "other": params["other"] + 1}, state)
        assert run.updates == 0
        for _ in range(12):
            mine, state = update(tx, params["mine"], state)
            params, state = run.step({**params, "mine": mine}, state)
    assert steps(tmp_path / "run") == [4, 8, 12]


def test_an_update_may_take_several_epochs_of_a_small_data_set(tmp_path):
    tx = optax.MultiSteps(optax.sgd(RATE), 5)
    calls = 0
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(PARAMS, tx.init(PARAMS))
        for _ in run.batches([0, 1]):
            params, state = run.step(*update(tx, params, state))
            calls += 1
    assert (calls, steps(tmp_path / "run")) == (60, [4, 8, 12])


def make(width, depth=2):
    return {str(layer): jnp.ones((width, width)) for layer in range(depth)}


STRANGERS = {
    "another width": (make(3), optax.adam(RATE).init(make(4))),
    "fewer layers": (make(3), optax.sgd(RATE, momentum=0.9).init(make(3, depth=3))),
    "accumulated": (make(3), optax.MultiSteps(optax.sgd(RATE), 2).init(make(4))),
    "another module": (
        nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
        nnx.Optimizer(nnx.Linear(5, 2, rngs=nnx.Rngs(0)), optax.adam(RATE), wrt=nnx.Param),
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_moments_that_belong_to_no_weights_are_refused_at_the_start(tmp_path, name):
    refused = r"do not belong together: \w+\.\w+ has an array of shape .*tx\.init"
    with SnapshotRun(tmp_path / "run", CYCLES) as run, pytest.raises(ProtocolError, match=refused):
        run.start(*STRANGERS[name])


BELONGING = {
    "masked": (PARAMS, optax.masked(optax.adam(RATE), {"b": True, "w": False}).init(PARAMS)),
    "factored": (make(200), optax.adafactor(RATE, min_dim_size_to_factor=100).init(make(200))),
    "flattened": (PARAMS, optax.flatten(optax.adam(RATE)).init(PARAMS)),
    "a critic's, whose weights are in the rest": (
        PARAMS,
        {"mine": optax.adam(RATE).init(PARAMS), "critic": make(7), "its": optax.adam(RATE).init(make(7))},
    ),
    "a population's": (
        jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PARAMS),
        jax.vmap(optax.adam(RATE).init)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PARAMS)),
    ),
}


@pytest.mark.parametrize("name", BELONGING)
def test_moments_of_all_kinds_that_belong_to_the_weights_are_accepted(tmp_path, name):
    variables, rest = BELONGING[name]
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        assert run.start(variables, rest)[0] is variables


def test_the_optimizer_is_named_by_the_states_that_optax_keeps():
    clipped = optax.chain(optax.clip(1.0), optax.adam(RATE))
    assert optimizer_name(("key", clipped.init(PARAMS))) == "ScaleByAdamState ScaleByScheduleState"
    assert optimizer_name(optax.MultiSteps(optax.sgd(RATE), 2).init(PARAMS)) == "MultiStepsState ScaleByScheduleState"
    assert optimizer_name({"mine": jnp.ones(2)}) == ""
