"""One of several processes that train one model: `python one_of_several.py directory layout port processes rank …`.

The further arguments are an update and a signal: after that update the process sends itself that signal.
"""

import functools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snapcore import CosineCycles
from snapcore_jax import SnapshotRun, snapshot_schedule

directory, layout, port, processes, rank, *end = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(rank))
mesh = Mesh(np.array(jax.devices()), ("data",))
everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
cycles = CosineCycles(lr=0.1, steps=120, cycles=3)
tx = optax.adam(snapshot_schedule(cycles))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def update(params, state, x):
    grads = jax.grad(lambda params: jnp.square(jnp.tanh(x @ params["w"].T) @ params["v"] - 1).mean())(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def batches():
    return [np.linspace(-1, scale, 24, dtype=np.float32).reshape(8, 3) for scale in (1, 2, 3, 4, 5, 6, 7)]


weights = spread if layout == "sharded" else everywhere
params = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "v": np.ones((4, 2), np.float32)}
params = jax.tree.map(lambda leaf: jax.device_put(leaf, weights), params)
state = jax.jit(tx.init)(params)
with SnapshotRun(directory, cycles, resume_every=10) as run:
    params, state = run.start(params, state)
    assert params["w"].sharding == weights
    for x in run.batches(batches()):
        params, state = run.step(*update(params, state, jax.device_put(x, spread)))
        if end and run.updates == int(end[0]):
            os.kill(os.getpid(), getattr(signal, end[1]))
