"""An ordinary TensorFlow loop on scikit-learn's digits. Three lines (and two imports) make it an ensemble of five.

Run it as `python examples/tensorflow_loop.py [directory]`; it takes a few seconds on a CPU.
"""

import sys

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from snapcore import CosineCycles
from snapcore_tensorflow import SnapshotEnsemble, SnapshotRun, SnapshotSchedule

directory = sys.argv[1] if len(sys.argv) > 1 else "runs/tensorflow_loop"
keras.utils.set_random_seed(0)
images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, test_size=0.5, random_state=0)
batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).batch(32, drop_remainder=True)

model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
cycles = CosineCycles(lr=0.2, steps=30 * len(batches), cycles=5)
optimizer = keras.optimizers.SGD(SnapshotSchedule(cycles), momentum=0.9, nesterov=True)
optimizer.build(model.trainable_variables)


@tf.function
def train_step(inputs, targets):
    with tf.GradientTape() as tape:
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, model(inputs, training=True))
        loss = tf.reduce_mean(each)
    optimizer.apply(tape.gradient(loss, model.trainable_variables))


with SnapshotRun(directory, cycles, model, optimizer, resume=False) as run:  # snapcore 1: an older run is moved aside
    for _ in range(30):
        for inputs, targets in batches:
            train_step(inputs, targets)
            run.step()  # snapcore 2: at the end of a cycle, takes a snapshot
ensemble = SnapshotEnsemble.load(directory, model)  # snapcore 3: a function that gives probabilities

members = ensemble.members(x_test)
for name, probabilities in [
    *((f"member {k}", each) for k, each in enumerate(members, 1)),
    ("ensemble", ensemble(x_test)),
]:
    error = np.mean(np.argmax(probabilities, 1) != y_test)
    nll = -np.log(np.take_along_axis(np.asarray(probabilities), y_test[:, None], 1)).mean()
    print(f"{name}: error {error:.2%}, NLL {nll:.4f}")
