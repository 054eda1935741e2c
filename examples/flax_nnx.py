"""An ordinary Flax NNX loop on scikit-learn's digits. Three lines (and two imports) make it an ensemble of five.

Run it as `python examples/flax_nnx.py [directory]`; it takes a few seconds on a CPU.
"""

import sys

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from snapcore import CosineCycles
from snapcore_jax import SnapshotEnsemble, SnapshotRun, snapshot_schedule

directory = sys.argv[1] if len(sys.argv) > 1 else "runs/flax_nnx"
images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, test_size=0.5, random_state=0)
batch, epochs, order = 32, 30, np.random.default_rng(0)
cycles = CosineCycles(lr=0.2, steps=epochs * (len(x) // batch), cycles=5)

rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Linear(64, 64, rngs=rngs), nnx.BatchNorm(64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs)
)
optimizer = nnx.Optimizer(model, optax.sgd(snapshot_schedule(cycles), momentum=0.9, nesterov=True), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, inputs, targets):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()

    optimizer.update(model, nnx.grad(loss)(model))


with SnapshotRun(directory, cycles, resume=False) as run:  # snapcore 1: an older run is moved aside
    for _ in range(epochs):
        for chosen in order.permutation(len(x))[: len(x) // batch * batch].reshape(-1, batch):
            train_step(model, optimizer, x[chosen], y[chosen])
            model, optimizer = run.step(model, optimizer)  # snapcore 2: at the end of a cycle, takes a snapshot
model.eval()
ensemble = SnapshotEnsemble.load(directory, lambda model, x: model(x), like=model)  # snapcore 3: gives probabilities

members = ensemble.members(x_test)
for name, probabilities in [
    *((f"member {k}", each) for k, each in enumerate(members, 1)),
    ("ensemble", ensemble(x_test)),
]:
    error = (probabilities.argmax(1) != y_test).mean()
    nll = -jnp.log(probabilities[jnp.arange(len(y_test)), y_test]).mean()
    print(f"{name}: error {error:.2%}, NLL {nll:.4f}")
