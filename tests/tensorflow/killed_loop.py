"""A training loop to be ended from outside, or to end itself: `python killed_loop.py directory [update signal]`."""

import os
import signal
import sys

import keras
import numpy as np
import tensorflow as tf

from snapcore import CosineCycles
from snapcore_tensorflow.run import SnapshotRun
from snapcore_tensorflow.schedule import SnapshotSchedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


class Shuffled:
    """Six batches an epoch, in an order that NumPy's global generator draws."""

    def __iter__(self):
        for index in np.random.permutation(6):
            yield tf.constant(np.roll(X, index) + np.float32(index / 10) * X * X)


def make_model(seed=5):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)]
    return keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(2)])


class Training:
    """A model, an optimizer and one traced update: made once, and given back the state that a new process has."""

    def __init__(self, optimizer):
        self.model, self.optimizer = make_model(), optimizer
        optimizer.build(self.model.trainable_variables)
        self._begun = [(variable, variable.numpy()) for variable in (*self.model.variables, *optimizer.variables)]

        @tf.function
        def update(x):
            with tf.GradientTape() as tape:
                loss = optimizer.scale_loss(tf.reduce_mean(tf.square(self.model(x, training=True) - 1)))
            optimizer.apply(tape.gradient(loss, self.model.trainable_variables))

        self.update = update

    def begin(self):
        for variable, value in self._begun:
            variable.assign(value)


def train(directory, training, program=CYCLES, loader=None, *, after_call=lambda call: None, **options):
    """Train to the end; the data's order, dropout and moments are all part of what must come back."""
    training.begin()
    call = 0
    with SnapshotRun(directory, program, training.model, training.optimizer, **options) as run:
        for x in run.batches(Shuffled() if loader is None else loader):
            training.update(x)
            run.step()
            call += 1
            after_call(call)
    return call


def main(directory, number=0, name="SIGKILL"):
    def end_itself(call):
        if call == int(number):
            os.kill(os.getpid(), getattr(signal, name))

    training = Training(keras.optimizers.Adam(SnapshotSchedule(CYCLES)))
    np.random.seed(0)
    train(directory, training, after_call=end_itself, resume_every=3)


if __name__ == "__main__":
    main(*sys.argv[1:])
