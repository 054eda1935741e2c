"""An ordinary Equinox loop on scikit-learn's digits. Three lines (and two imports) make it an ensemble of five.

Run it as `python examples/equinox_mlp.py [directory]`; it takes a few seconds on a CPU.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from snapcore import CosineCycles
from snapcore_jax import SnapshotEnsemble, SnapshotRun, snapshot_schedule

directory = sys.argv[1] if len(sys.argv) > 1 else "runs/equinox_mlp"
images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, test_size=0.5, random_state=0)
batch, epochs, order = 32, 30, np.random.default_rng(0)
cycles = CosineCycles(lr=0.2, steps=epochs * (len(x) // batch), cycles=5)
tx = optax.sgd(snapshot_schedule(cycles), momentum=0.9, nesterov=True)

model = eqx.nn.MLP(64, 10, width_size=64, depth=1, key=jax.random.key(0))
state = tx.init(eqx.filter(model, eqx.is_array))


@eqx.filter_jit(donate="all-except-first")  # the batch comes first; the buffers of model and state are reused
def train_step(data, model, state):
    def loss(model, inputs, targets):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(inputs), targets).mean()

    updates, state = tx.update(eqx.filter_grad(loss)(model, *data), state, model)
    return eqx.apply_updates(model, updates), state


with SnapshotRun(directory, cycles, resume=False) as run:  # snapcore 1: an older run is moved aside
    for _ in range(epochs):
        for chosen in order.permutation(len(x))[: len(x) // batch * batch].reshape(-1, batch):
            model, state = train_step((x[chosen], y[chosen]), model, state)
            model, state = run.step(model, state)  # snapcore 2: at the end of a cycle, takes a snapshot
ensemble = SnapshotEnsemble.load(directory, lambda model, x: jax.vmap(model)(x), like=model)  # snapcore 3

members = ensemble.members(x_test)
for name, probabilities in [
    *((f"member {k}", each) for k, each in enumerate(members, 1)),
    ("ensemble", ensemble(x_test)),
]:
    error = (probabilities.argmax(1) != y_test).mean()
    nll = -jnp.log(probabilities[jnp.arange(len(y_test)), y_test]).mean()
    print(f"{name}: error {error:.2%}, NLL {nll:.4f}")
