"""An ordinary JAX and optax loop on scikit-learn's digits. Three lines (and two imports) make it an ensemble of five.

Run it as `python examples/jax_loop.py [directory]`; it takes a few seconds on a CPU.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from snapcore import CosineCycles
from snapcore_jax import SnapshotEnsemble, SnapshotRun, snapshot_schedule

directory = sys.argv[1] if len(sys.argv) > 1 else "runs/jax_loop"
images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, test_size=0.5, random_state=0)
batch, epochs, order = 32, 30, np.random.default_rng(0)
cycles = CosineCycles(lr=0.2, steps=epochs * (len(x) // batch), cycles=5)
tx = optax.sgd(snapshot_schedule(cycles), momentum=0.9, nesterov=True)


def apply(params, inputs):
    return jax.nn.relu(inputs @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


@jax.jit
def train_step(params, state, inputs, targets):
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, inputs), targets).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


k1, k2 = jax.random.split(jax.random.key(0))
params = {"w1": jax.random.normal(k1, (64, 64)) / 8, "b1": jnp.zeros(64)}
params |= {"w2": jax.random.normal(k2, (64, 10)) / 8, "b2": jnp.zeros(10)}
state = tx.init(params)
with SnapshotRun(directory, cycles, resume=False) as run:  # snapcore 1: an older run is moved aside
    for _ in range(epochs):
        for chosen in order.permutation(len(x))[: len(x) // batch * batch].reshape(-1, batch):
            params, state = train_step(params, state, x[chosen], y[chosen])
            params, state = run.step(params, state)  # snapcore 2: at the end of a cycle, takes a snapshot
ensemble = SnapshotEnsemble.load(directory, apply, like=params)  # snapcore 3: a function that gives probabilities

members = ensemble.members(x_test)
for name, probabilities in [
    *((f"member {k}", each) for k, each in enumerate(members, 1)),
    ("ensemble", ensemble(x_test)),
]:
    error = (probabilities.argmax(1) != y_test).mean()
    nll = -jnp.log(probabilities[jnp.arange(len(y_test)), y_test]).mean()
    print(f"{name}: error {error:.2%}, NLL {nll:.4f}")
