"""Fresh weights between members, in the forms that Keras has for them; the rest is in the conformance suite."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapcore import DataError, program
from snapcore.store import SnapshotStore
from snapcore_tensorflow.run import SnapshotRun
from snapcore_tensorflow.schedule import SnapshotSchedule

PLAN = program("singlecycle", lr=0.1, steps=12, cycles=3)
X = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)


def make():
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((3,)), *layers])


def values(model):
    return [weight.tolist() for weight in model.get_weights()]


def starts(directory, init):
    """Train to the end; return the weights that the members after the first began with."""
    model, optimizer, found = make(), keras.optimizers.Adam(SnapshotSchedule(PLAN.schedule)), []
    optimizer.build(model.trainable_variables)

    @tf.function
    def update():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(X, training=True) - 1))
        optimizer.apply(tape.gradient(loss, model.trainable_variables))

    with SnapshotRun(directory, PLAN, model, optimizer, init=init) as run:
        while not run.finished:
            update()
            run.step()
            if run.updates in (4, 8):
                found.append(values(model))
    return found


@pytest.mark.parametrize("as_model", [True, False])
def test_fresh_weights_are_a_model_or_arrays_by_name_and_stay_as_they_were_given(tmp_path, as_model):
    fresh = {number: make() for number in (2, 3)}
    before = [values(model) for model in fresh.values()]

    def named(number):  # the position of each weight decides
        return {f"{position:03d}/any": array for position, array in enumerate(fresh[number].get_weights())}

    begun = starts(tmp_path / "run", fresh.get if as_model else named)
    assert begun == [values(model) for model in fresh.values()] == before


def test_fresh_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    with pytest.raises(DataError, match=r"a restart.s member does not fit the model .*'002/"):
        starts(tmp_path / "run", lambda number: other)
    assert len(SnapshotStore(tmp_path / "run").members) == 1
