"""The managed loop in JAX beside the same updates in a `lax.scan` written by hand, and called one by one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import Setting, Suite
from compare import Contender
from flax import nnx
from jax import lax
from jax_common import Cnn, Mlp, about, made

from snapcore import program
from snapcore.data import TrainingData
from snapcore_jax.backend import JaxBackend

suite = Suite(about())

LR, STEPS = 0.05, 10**6
Train = Callable[[int, int], None]
Model = type[Cnn] | type[Mlp]


def images(setting: Setting) -> TrainingData:
    """Return noise of CIFAR's shape."""
    examples, batch = setting.pick(full=(8192, 128), small=(512, 32), tiny=(32, 8))
    side = setting.pick(full=32, small=8, tiny=8)
    setting.found |= {"batch": batch, "side": side}
    random = np.random.default_rng(0)
    x = random.standard_normal((examples, 3, side, side), np.float32)
    return TrainingData(x, random.integers(0, 10, examples), n_classes=10, batch_size=batch)


def managed(model: Model, data: TrainingData) -> Train:
    backend, method = JaxBackend(), program("snapshot", lr=LR, steps=STEPS, cycles=2)
    states = [backend.init(model, data, method, seed=0)]

    def train(start: int, stop: int) -> None:
        states.append(backend.train(states.pop(), start, stop, report=lambda *_: None))
        jax.block_until_ready(states[0].training)

    return train


def by_hand(model: Model, data: TrainingData) -> tuple[Train, Train]:
    """Return the updates that the managed loop does as one would write them: scanned, and called one by one."""
    graph, state = made(lambda: model(data.x.shape[1:], data.n_classes, nnx.Rngs(0)))
    params, others = nnx.split_state(state, nnx.Param, ...)
    x, y = jnp.array(data.x), jnp.array(data.y, jnp.int32)
    rate = optax.cosine_decay_schedule(LR, STEPS // 2)
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, momentum=0.9, nesterov=True))

    def update(carry: Any, rows: Any) -> Any:
        params, others, state = carry

        def objective(params: Any) -> Any:
            module = nnx.merge(graph, params, others, copy=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(module(x[rows]), y[rows]).mean()
            return loss, nnx.split(module, nnx.Param, ...)[2]

        (loss, others), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        changes, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, changes), others, state), loss

    one = jax.jit(update, donate_argnums=0)
    scan = jax.jit(lambda carry, rows: lax.scan(update, carry, rows), donate_argnums=0)
    begun = params, others, optimizer.init(params)
    carries = {"scan": jax.tree.map(jnp.copy, begun), "one": jax.tree.map(jnp.copy, begun)}

    def scanned(start: int, stop: int) -> None:
        carries["scan"], losses = scan(carries["scan"], data.indices(start, stop))
        np.asarray(losses)
        jax.block_until_ready(carries["scan"])

    def called(start: int, stop: int) -> None:
        losses = []
        for rows in data.indices(start, stop):
            carries["one"], loss = one(carries["one"], rows)
            losses.append(loss)
        np.asarray(jnp.stack(losses))
        jax.block_until_ready(carries["one"])

    return scanned, called


def continued(train: Train, updates: int) -> Contender:
    """Return a contender whose every sample does the next updates."""
    done = 0

    def run() -> None:
        nonlocal done
        train(done, done + updates)
        done += updates

    return Contender(run, units=updates)


def loops(setting: Setting, model: Model, updates: int) -> None:
    data = images(setting)
    setting.found |= {"updates in a sample": updates, "model": model.__name__}
    scanned, called = by_hand(model, data)
    setting.compare(
        {"managed": continued(managed(model, data), updates)},
        {
            "by hand, lax.scan": continued(scanned, updates),
            "by hand, one compiled update after another": continued(called, updates),
        },
    )


@suite.comparison("an MLP, per update")
def dense(setting: Setting) -> None:
    loops(setting, Mlp, setting.pick(full=1000, small=200, tiny=8))


@suite.comparison("a convolutional network, per update", share=2)
def convolutional(setting: Setting) -> None:
    model = setting.pick(full=Cnn, small=Cnn, tiny=Mlp)  # XLA takes long to compile convolutions for a CPU
    loops(setting, model, setting.pick(full=200, small=10, tiny=2))
