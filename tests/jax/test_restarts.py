"""What happens between members: other weights, and the optimizer's moments kept or reset, never its count."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from snapcore import CosineCycles, DataError, Program, ProtocolError, Restart, program
from snapcore.store import SnapshotStore
from snapcore_jax.counting import read_count, with_new_moments
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
RATE = snapshot_schedule(CYCLES)
TX = optax.adam(RATE)


def make(value=1.0):
    return {"b": jnp.full(2, value), "w": jnp.full((3, 2), value)}


@functools.partial(jax.jit, donate_argnums=(0, 1))
def update(params, state):
    updates, state = TX.update(jax.tree.map(jnp.cos, params), state, params)
    return optax.apply_updates(params, updates), state


def host(tree):
    return jax.tree.map(np.array, tree)


def starts(directory, what, **options):
    """Train to the end; return the weights and the optimizer's state that each member's training began with."""
    params = make()
    rest = {"optimizer": TX.init(params), "key": jax.random.key(7)}
    with SnapshotRun(directory, what, **options) as run:
        params, rest = run.start(params, rest)
        found = [host((params, rest["optimizer"]))]
        while not run.finished:
            params, rest["optimizer"] = update(params, rest["optimizer"])
            params, rest = run.step(params, rest)
            if run.updates % 4 == 0 and not run.finished:
                found.append(host((params, rest["optimizer"])))
    return found


def member(directory, index):
    return SnapshotStore(directory).load(index)


def same(one, other):
    return all(np.array_equal(each, other[name]) for name, each in one.items())


def moments(state):
    return [float(np.abs(leaf).max()) for leaf in jax.tree.leaves((state[0].mu, state[0].nu))]


@pytest.mark.parametrize("moved", ["keep", "reset"])
def test_a_restart_from_the_first_brings_its_weights_back_and_keeps_the_count(tmp_path, moved):
    """Users ask for the choice to reset the optimizer or to keep it: nobody offers it."""
    begun = starts(tmp_path / "run", Program("mine", CYCLES, Restart("first", moved)), optimizer=TX)
    for index, (params, state) in enumerate(begun[1:], 1):
        assert same(params, member(tmp_path / "run", 1))
        assert (max(moments(state)) == 0) == (moved == "reset")
        assert state[0].count == (0 if moved == "reset" else 4 * index)  # Adam's corrects the bias of its moments
        assert state[1].count == 4 * index


def test_a_program_with_a_reset_and_no_optimizer_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ProtocolError, match="star resets the optimizer between members: pass optimizer="):
        SnapshotRun(tmp_path / "run", program("star", lr=0.1, steps=12, cycles=3))
    assert not (tmp_path / "run").exists()


def test_a_program_with_a_reset_needs_the_state_it_is_to_reset(tmp_path):
    star = program("star", lr=0.1, steps=12, cycles=3)
    refused = r"star resets the optimizer: give run\.start its state too"
    with SnapshotRun(tmp_path / "run", star, optimizer=TX) as run, pytest.raises(ProtocolError, match=refused):
        run.start(make())


def test_fresh_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    what = program("singlecycle", lr=0.1, steps=12, cycles=3)
    with pytest.raises(DataError, match=r"a restart.s member does not fit the model .*'w' \(3, 2\) is missing"):
        starts(tmp_path / "run", what, optimizer=TX, init=lambda _: {"b": jnp.ones(2)})


OPTIMIZERS = {
    "sgd": optax.sgd(RATE, momentum=0.9),
    "adam with clipping": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=RATE),
    "accumulating": optax.MultiSteps(optax.adam(RATE), 2),
    "if finite": optax.apply_if_finite(optax.adam(RATE), 3),
    "groups": optax.multi_transform({"a": optax.sgd(RATE, momentum=0.9), "b": optax.adam(RATE)}, {"b": "a", "w": "b"}),
    "adagrad, whose moments do not start at 0": optax.adagrad(RATE),
    "masked": optax.masked(optax.adam(RATE), {"b": True, "w": False}),
}


@pytest.mark.exhaustive(keep=3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_moments_are_those_of_a_new_optimizer_and_the_schedules_continue(name):
    """The oracle: the rate of the next update, and all else as `init` makes it."""
    tx, params = OPTIMIZERS[name], make()
    state = tx.init(params)
    for _ in range(6):
        _, state = jax.jit(tx.update)(make(0.5), state, params)
    count = read_count(state)
    assert count == (3 if name == "accumulating" else 6)
    key = jax.random.key(1)
    found, found_key = with_new_moments(tx, params, (state, key))
    assert read_count(found) == count
    assert found_key is key
    assert jax.tree.structure(found) == jax.tree.structure(state)
    new = tx.init(params)
    same_as_new = [
        np.array_equal(one, other)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(new), strict=True)
        if one.ndim
    ]
    assert all(same_as_new)


def test_hyperparameters_that_were_set_by_hand_stay():
    tx, params = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9), make()
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.array(0.025)
    assert with_new_moments(tx, params, state).hyperparams["learning_rate"] == np.float32(0.025)


def test_an_optimizer_without_moments_has_nothing_to_reset():
    tx = optax.sgd(0.1)
    rest = (tx.init(make()), jax.random.key(0))
    assert with_new_moments(tx, make(), rest) is rest


def test_of_linen_variables_the_parameters_are_the_optimizers():
    variables = {"params": make(), "batch_stats": {"mean": jnp.ones(2)}}
    _, state = TX.update(make(0.5), TX.init(variables["params"]))
    found = with_new_moments(TX, variables, state)
    assert max(moments(found)) == 0
    assert (found[0].count, found[1].count) == (0, 1)


def test_an_equinox_module_is_one_too():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_array)
    _, state = TX.update(arrays, TX.init(arrays))
    assert (max(moments(state)) > 0, max(moments(with_new_moments(TX, model, state)))) == (True, 0)


def test_the_optimizer_of_nnx_is_given_as_a_function_of_the_model():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: jnp.square(model(jnp.ones((1, 3)))).sum())(model))
    found, _ = with_new_moments(
        lambda model: nnx.Optimizer(model, TX, wrt=nnx.Param), model, (optimizer, jax.random.key(0))
    )
    assert isinstance(found, nnx.Optimizer)
    assert (read_count(found), max(moments(jax.tree.map(np.array, found.opt_state)))) == (1, 0)


@pytest.mark.parametrize("rest", [(), (TX.init(make()), TX.init(make())), optax.sgd(RATE).init(make())])
def test_a_state_that_is_not_there_once_is_refused_with_the_cure(rest):
    with pytest.raises(ProtocolError, match=r"must be in `rest` once, .* pass the transformation that made it"):
        with_new_moments(TX, make(), rest)
