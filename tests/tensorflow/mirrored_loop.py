"""The same loop on one device and on several: `python mirrored_loop.py directory`.

It compares one device with two; with TF_CONFIG it is one of several workers, and prints a digest of its last weights.
"""

import hashlib
import os
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from snapcore import CosineCycles, Program, Restart, program
from snapcore_tensorflow.run import SnapshotRun
from snapcore_tensorflow.schedule import SnapshotSchedule

PROGRAM = Program("mine", CosineCycles(lr=0.1, steps=12, cycles=3), Restart("first", "reset"))
X = np.tile(np.random.default_rng(0).normal(size=(4, 3)), (2, 1)).astype(np.float32)
"""Its halves are the same, and so are the batch statistics of both devices."""


def make_model():
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((3,)), *layers])


def begin(strategy, rate):
    with strategy.scope():
        model, optimizer = make_model(), keras.optimizers.SGD(rate, momentum=0.9)
        optimizer.build(model.trainable_variables)
    replicas = strategy.num_replicas_in_sync

    def update_part(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(x, training=True) - 1)) / len(X)
        optimizer.apply(tape.gradient(loss, model.trainable_variables))

    @tf.function
    def update():
        parts = tf.split(X, replicas)
        values = strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group]
        )
        strategy.run(update_part, args=(values,))

    return model, optimizer, update


def train(directory, strategy, rate, what=PROGRAM, last=12, **options):
    model, optimizer, update = begin(strategy, rate)
    with SnapshotRun(directory, what, model, optimizer, **options) as run:
        while run.updates < last:
            update()
            run.step()
    return model


def compare(folder):
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    mirrored, single = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.get_strategy()
    for name, rate in {"schedule": SnapshotSchedule(PROGRAM.schedule), "plain": 0.7}.items():
        for how, strategy, last in (
            ("single", single, 12),
            ("mirrored", mirrored, 12),
            ("resumed", mirrored, 6),
            ("resumed", mirrored, 12),
        ):
            keras.utils.set_random_seed(0)
            train(Path(folder, f"{name} {how}"), strategy, rate, last=last)


def be_one_of_several(folder):
    """Train in two parts, from weights that every worker draws for itself."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    what = program("singlecycle", lr=0.1, steps=12, cycles=3)
    for last in (6, 12):
        model = train(Path(folder, "run"), strategy, 0.7, what, last, init=lambda _: make_model(), resume_every=3)
    print(hashlib.sha256(b"".join(array.tobytes() for array in model.get_weights())).hexdigest())


if __name__ == "__main__":
    (be_one_of_several if "TF_CONFIG" in os.environ else compare)(*sys.argv[1:])
