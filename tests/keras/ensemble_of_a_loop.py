"""Train a Keras model in a loop of JAX or PyTorch: `python ensemble_of_a_loop.py DIRECTORY`, with KERAS_BACKEND set.

DIRECTORY gets `run`, and `wanted.npz` with a batch and the probabilities that the model itself gave at each member.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from snapcore import CosineCycles

directory = Path(sys.argv[1])
cycles = CosineCycles(lr=0.5, steps=16, cycles=2)
x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
labels = np.arange(8) % 4
layers.Dense(1)  # so that Keras' numbers are others than those of the process that loads
model = keras.Sequential(
    [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(4)]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
wanted = []


def in_pytorch():
    import torch

    from snapcore_torch import SnapshotRun

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with SnapshotRun(directory / "run", cycles, model, optimizer) as run:
        while not run.finished:
            optimizer.zero_grad()
            loss(labels, model(x, training=True)).backward()
            optimizer.step()
            run.step()
            if run.updates % 8 == 0:
                wanted.append(ops.convert_to_numpy(ops.softmax(model(x, training=False))))


def in_jax():
    import jax

    from snapcore_jax import SnapshotRun, snapshot_schedule

    rate = snapshot_schedule(cycles)

    @jax.jit
    def update(variables, step):
        def objective(trained):
            logits, others = model.stateless_call(trained, variables[1], x, training=True)
            return loss(labels, logits), others

        (_, others), gradients = jax.value_and_grad(objective, has_aux=True)(variables[0])
        return [each - rate(step) * gradient for each, gradient in zip(variables[0], gradients, strict=True)], others

    with SnapshotRun(directory / "run", cycles) as run:
        start = [[each.value for each in part] for part in (model.trainable_variables, model.non_trainable_variables)]
        variables, rest = run.start(tuple(start), {"step": np.int32(0)})
        while not run.finished:
            variables = update(variables, rest["step"])
            variables, rest = run.step(variables, {"step": np.int32(rest["step"] + 1)})
            if run.updates % 8 == 0:
                wanted.append(np.asarray(jax.nn.softmax(model.stateless_call(*variables, x, training=False)[0])))


{"torch": in_pytorch, "jax": in_jax}[keras.backend.backend()]()
np.savez(directory / "wanted.npz", x=x, probabilities=np.array(wanted))
