"""A training loop to be ended from outside, or to end itself: `python killed_loop.py directory [update signal]`."""

import functools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snapcore import CosineCycles
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)


class Shuffled:
    """Six batches an epoch, in an order that NumPy's global generator draws."""

    def __iter__(self):
        for index in np.random.permutation(6):
            yield jnp.linspace(-1, 1, 12).reshape(4, 3) + index / 10


def make_update(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, rest, x):
        state, key = rest
        key, now = jax.random.split(key)
        kept = jax.random.bernoulli(now, 0.7, x.shape)
        grads = jax.grad(lambda params: jnp.square((x * kept) @ params["w"] + params["b"] - 1).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), (state, key)

    return update


def begin(tx):
    params = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}
    return params, (tx.init(params), jax.random.key(5))


def train(directory, tx, update, program=CYCLES, *, after_call=lambda call: None, **options):
    """Train to the end; the data's order, dropout and moments are all part of what must come back."""
    params, rest = begin(tx)
    call = 0
    with SnapshotRun(directory, program, **options) as run:
        params, rest = run.start(params, rest)
        for x in run.batches(Shuffled()):
            params, rest = run.step(*update(params, rest, x))
            call += 1
            after_call(call)
    return call


def main(directory, number=0, name="SIGKILL"):
    def end_itself(call):
        if call == int(number):
            os.kill(os.getpid(), getattr(signal, name))

    np.random.seed(0)
    tx = optax.adam(snapshot_schedule(CYCLES))
    train(directory, tx, make_update(tx), after_call=end_itself, resume_every=3)


if __name__ == "__main__":
    main(*sys.argv[1:])
