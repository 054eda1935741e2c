"""Snapshots from a loop of one's own: any tree, the right bits, and nothing that donation takes away."""

import functools
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from snapcore import CosineCycles, ProtocolError
from snapcore.store import SnapshotStore
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
TX = optax.sgd(snapshot_schedule(CYCLES), momentum=0.9)
X = jnp.linspace(-1, 1, 18).reshape(6, 3)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=[])
@dataclass
class Layer:
    w: jax.Array
    b: jax.Array


def layer():
    return {"w": jnp.arange(6.0).reshape(3, 2) / 5, "b": jnp.ones(2)}


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=True)(linen.Dense(2)(x))


TREES = {
    "dictionary": layer,
    "tuple": lambda: (jnp.ones((3, 2)), [jnp.ones(2)]),
    "dataclass": lambda: Layer(**layer()),
    "one array": lambda: jnp.ones((3, 2)),
    "bfloat16": lambda: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer()),
    "linen variables": lambda: Dense().init(jax.random.key(0), X),
    "nnx state": lambda: nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0))),
    "equinox module": lambda: eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)),
}


def arrays_of(tree):
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else None, tree)


def make_update(donate, tx=TX):
    """Return a function that moves every array of a tree by a real optimizer."""

    @functools.partial(jax.jit, donate_argnums=(0, 1) if donate else ())
    def update(arrays, state, step):
        grads = jax.tree.map(lambda leaf: jnp.cos(leaf + step.astype(leaf.dtype)), arrays)
        updates, state = tx.update(grads, state, arrays)
        return optax.apply_updates(arrays, updates), state

    return update


UPDATE = {donate: make_update(donate) for donate in (True, False)}


def bits(tree):
    """The bytes of every array, in the tree's order, found without the adapter."""
    return [np.array(leaf).tobytes() for leaf in jax.tree.leaves(arrays_of(tree))]


def on_disk(directory, index):
    return [array.tobytes() for array in SnapshotStore(directory).load(index).values()]


def train(directory, tree, *, donate=True, schedule=CYCLES, **options):
    """Train to the end, and copy by hand what each snapshot should hold."""
    static = jax.tree.map(lambda leaf: None if isinstance(leaf, jax.Array) else leaf, tree)
    arrays, state, copies = arrays_of(tree), TX.init(arrays_of(tree)), []
    with SnapshotRun(directory, schedule, **options) as run:
        tree, state = run.start(eqx.combine(arrays, static), state)
        for step in range(schedule.steps):
            arrays, state = UPDATE[donate](arrays_of(tree), state, jnp.array(step))
            if step + 1 in schedule.snapshot_steps:
                copies.append(bits(arrays))
            tree, state = run.step(eqx.combine(arrays, static), state)
    assert run.finished
    return copies


@pytest.mark.parametrize("name", TREES)
def test_a_snapshot_of_any_tree_holds_bit_for_bit_what_a_hand_would_have_copied_then(tmp_path, name):
    """Users report members that all equal the last weights, because what was kept was no copy."""
    copies = train(tmp_path / "run", TREES[name]())
    assert [sorted(on_disk(tmp_path / "run", index)) for index in (1, 2, 3)] == [sorted(copy) for copy in copies]
    assert len({str(copy) for copy in copies}) == 3


def test_members_are_the_same_bits_with_donation_and_without(tmp_path):
    for donate in (True, False):
        train(tmp_path / str(donate), layer(), donate=donate)
    for index in (1, 2, 3):
        assert on_disk(tmp_path / "True", index) == on_disk(tmp_path / "False", index)


def test_donated_buffers_are_used_again_at_every_update_also_after_a_capture(tmp_path):
    """A snapshot that held on to the arrays would make JAX allocate new ones, and say nothing."""
    params, state = layer(), TX.init(layer())
    with SnapshotRun(tmp_path / "run", CYCLES, resume_every=3) as run:
        params, state = run.start(params, state)
        for step in range(12):
            pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
            params, state = run.step(*UPDATE[True](params, state, jnp.array(step)))
            assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))] == pointers
            assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))


def test_what_step_returns_is_what_it_was_given(tmp_path):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, rest = layer(), TX.init(layer())
        assert run.start(params, rest)[0] is params
        for step in range(12):
            params, rest = UPDATE[False](params, rest, jnp.array(step))
            found = run.step(params, rest)
            assert found[0] is params
            assert found[1] is rest


@pytest.mark.parametrize("at", [1, 4])
def test_an_array_that_was_donated_is_refused_with_the_rule_and_the_cure(tmp_path, at):
    params, state = layer(), TX.init(layer())
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for step in range(at):
            old, (params, state) = params, UPDATE[True](params, state, jnp.array(step))
            if step + 1 < at:
                params, state = run.step(params, state)
        refused = r"'variables/b' was donated to an update and is gone: after donate_argnums, give run\.step what"
        with pytest.raises(ProtocolError, match=refused):
            run.step(old, state)
    assert SnapshotStore(tmp_path / "run").members == ()


def test_a_step_inside_jit_is_refused(tmp_path):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        with pytest.raises(ProtocolError, match=r"'variables/w' is being traced: call run.step outside of jax.jit"):
            jax.jit(run.step)({"w": jnp.ones(2)})
        assert run.updates == 0


def test_random_keys_are_no_part_of_a_member(tmp_path):
    """A key is not trained: averaged or restored with other weights it would make no sense."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    variables = {"model": Model(nnx.Rngs(0)), "key": jax.random.key(3)}
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for _ in range(12):
            variables = run.step(variables)
    assert sorted(SnapshotStore(tmp_path / "run").load(3)) == ["model/linear/bias", "model/linear/kernel"]


def test_an_nnx_model_and_its_optimizer_may_be_changed_in_place(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer, copies = nnx.Optimizer(model, TX, wrt=nnx.Param), []

    @nnx.jit
    def update(model, optimizer):
        grads = nnx.grad(lambda model: jnp.square(model(X)).mean())(model)
        optimizer.update(model, grads)

    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        model, optimizer = run.start(model, optimizer)
        while not run.finished:
            update(model, optimizer)
            copies.append([np.array(model.bias[...]), np.array(model.kernel[...])])
            run.step(model, optimizer)
    for index, step in enumerate(CYCLES.snapshot_steps, 1):
        member = SnapshotStore(tmp_path / "run").load(index)
        assert list(member) == ["bias", "kernel"]
        for name, by_hand in zip(member, copies[step - 1], strict=True):
            np.testing.assert_array_equal(member[name], by_hand)
