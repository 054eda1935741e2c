"""Flax NNX objects refer to each other: what was shared when a run began is shared after a resume and a restart."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from snapcore import CosineCycles, program
from snapcore.store import SnapshotStore
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule
from snapcore_jax.trees import named_leaves, named_parts, with_leaves

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
TX = optax.adam(snapshot_schedule(CYCLES))
X = jnp.linspace(-1, 1, 12).reshape(4, 3)


class Tower(nnx.Module):
    def __init__(self, embedding, rngs):
        self.embedding = embedding
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.embedding(x))


def towers():
    rngs = nnx.Rngs(0)
    embedding = nnx.Linear(3, 4, rngs=rngs)
    return Tower(embedding, rngs), Tower(embedding, rngs)


def loss(model):
    model = model if isinstance(model, tuple) else (model,)
    return sum(jnp.square(each(X) - 1).mean() for each in model)


def model_and_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    return model, nnx.ModelAndOptimizer(model, TX)


def update_model_and_optimizer(_, optimizer):
    optimizer.update(nnx.grad(loss)(optimizer.model))


def towers_and_optimizer():
    both = towers()
    return both, nnx.Optimizer(nnx.List(both), TX, wrt=nnx.Param)


def update_towers(both, optimizer):
    grads = nnx.grad(lambda pair: loss(tuple(pair)))(nnx.List(both))
    optimizer.update(nnx.List(both), grads)


def model_and_frozen_reader():
    """The rest holds a second head on the embedding that is trained, as a probe does."""
    model, probe = towers()
    return model, {"optimizer": nnx.Optimizer(model, TX, wrt=nnx.Param), "probe": probe}


def update_beside_reader(model, rest):
    rest["optimizer"].update(model, nnx.grad(loss)(model))
    model.out.bias[...] += 1e-3 * rest["probe"](X).mean()


def loose_parameter():
    weight = nnx.Param(jnp.ones((3, 2)))
    holder = nnx.Module()
    holder.weight = weight
    return {"w": weight}, (TX.init(weight[...]), holder)


def update_loose(_, rest):
    state, holder = rest
    updates, new = TX.update(jnp.cos(holder.weight[...]), state)
    holder.weight[...] += updates
    return new


KINDS = {
    "an optimizer that has its model": (model_and_optimizer, update_model_and_optimizer),
    "two towers with one embedding": (towers_and_optimizer, update_towers),
    "a probe in the rest": (model_and_frozen_reader, update_beside_reader),
    "a parameter without a module": (loose_parameter, update_loose),
}


def train(directory, kind, last=12, what=CYCLES, **options):
    make, update = KINDS[kind]
    variables, rest = make()
    with SnapshotRun(directory, what, **options) as run:
        variables, rest = run.start(variables, rest)
        while run.updates < last:
            new_state = update(variables, rest)
            rest = rest if new_state is None else (new_state, rest[1])
            variables, rest = run.step(variables, rest)
    return variables, rest


def members(directory):
    store = SnapshotStore(directory)
    return [store.load(member.index) for member in store.members]


def same(one, other):
    return len(one) == len(other) == 3 and all(
        np.array_equal(array, theirs[name])
        for own, theirs in zip(one, other, strict=True)
        for name, array in own.items()
    )


@pytest.mark.exhaustive(keep=3)
@pytest.mark.parametrize("last", [4, 6, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_left_and_resumed_has_the_members_of_one_that_was_not(tmp_path, kind, last):
    train(tmp_path / "whole", kind)
    train(tmp_path / "run", kind, last)
    train(tmp_path / "run", kind)
    assert same(members(tmp_path / "run"), members(tmp_path / "whole"))
    first, second, third = (next(iter(member.values())) for member in members(tmp_path / "run"))
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_after_a_restart_the_optimizer_trains_the_model_that_the_loop_has(tmp_path):
    star = program("star", lr=0.1, steps=12, cycles=3)
    made_again = {"optimizer": lambda model: nnx.ModelAndOptimizer(model, TX)}
    model, optimizer = train(tmp_path / "run", "an optimizer that has its model", what=star, **made_again)
    assert optimizer.model.kernel is model.kernel
    one, two, three = (member["kernel"] for member in members(tmp_path / "run"))
    assert not np.array_equal(one, two)
    # Both begin at the first member with new moments, and the rates of all cycles are the same.
    np.testing.assert_array_equal(two, three)


def test_a_restart_that_keeps_the_moments_leaves_what_is_shared_shared(tmp_path):
    single = program("singlecycle", lr=0.1, steps=12, cycles=3)
    model, rest = train(
        tmp_path / "run",
        "a probe in the rest",
        what=single,
        init=lambda _: towers()[0],
        optimizer=lambda model: nnx.Optimizer(model, TX, wrt=nnx.Param),
    )
    assert rest["probe"].embedding.kernel is model.embedding.kernel


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shared_is_saved_once_with_the_weights(kind):
    variables, rest = KINDS[kind][0]()
    own, others = named_parts(variables, rest)
    assert own.keys() == named_leaves(variables).keys()
    pointers = [array.unsafe_buffer_pointer() for array in (*own.values(), *others.values())]
    assert len(set(pointers)) == len(pointers)


def test_towers_in_a_tuple_share_their_embedding_when_a_member_is_loaded():
    both = towers()
    names = list(named_leaves(both))
    assert [name for name in names if "embedding" in name] == ["0/embedding/bias", "0/embedding/kernel"]
    zeros = {name: np.zeros_like(array) for name, array in named_leaves(both).items()}
    first, second = with_leaves(both, zeros)
    assert first.embedding is second.embedding
    assert not np.any(second(X))
