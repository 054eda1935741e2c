"""`model.fit` on scikit-learn's digits. Three lines (and two imports) make it an ensemble of five.

Run it as `KERAS_BACKEND=jax python examples/keras_fit.py [directory]`, or with torch, or tensorflow; it takes a few
seconds on a CPU. (`resume=False`: an older run is moved aside.)
"""

import sys

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from snapcore import CosineCycles
from snapcore_keras import SnapshotCallback, SnapshotEnsemble, SnapshotSchedule

directory = sys.argv[1] if len(sys.argv) > 1 else "runs/keras_fit"
keras.utils.set_random_seed(0)
images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, test_size=0.5, random_state=0)
batch, epochs = 32, 30
cycles = CosineCycles(lr=0.2, steps=epochs * -(-len(x) // batch), cycles=5)

model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)])
model.compile(
    keras.optimizers.SGD(SnapshotSchedule(cycles), momentum=0.9, nesterov=True),  # snapcore 1: the rates
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
callback = SnapshotCallback(directory, cycles, resume=False)  # snapcore 2: at the end of a cycle, takes a snapshot
model.fit(x, y, batch_size=batch, epochs=epochs, callbacks=[callback], verbose=0)
ensemble = SnapshotEnsemble.load(directory, model)  # snapcore 3: a model that gives probabilities

members = keras.ops.convert_to_numpy(ensemble.members(x_test))
for name, probabilities in [
    *((f"member {k}", each) for k, each in enumerate(members, 1)),
    ("ensemble", keras.ops.convert_to_numpy(ensemble(x_test))),
]:
    error = (probabilities.argmax(1) != y_test).mean()
    nll = -np.log(probabilities[np.arange(len(y_test)), y_test]).mean()
    print(f"{name}: error {error:.2%}, NLL {nll:.4f}")
