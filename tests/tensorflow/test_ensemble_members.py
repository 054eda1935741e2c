"""The ensemble of TensorFlow's own loop refuses, picks and counts what Keras' does, in a graph and by XLA."""

import pickle
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from snapcore import CorruptSnapshotError, DataError
from snapcore.store import SnapshotStore
from snapcore_keras.state import Copy, named_weights
from snapcore_tensorflow import SnapshotEnsemble

X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(6, 4)
STRATEGIES = ("loop", "xla")


def softmax64(logits, axis=-1):
    """The textbook formula in NumPy, float64."""
    powers = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def vary(model, number):
    for position, weight in enumerate(model.weights):
        weight.assign(np.sin(3.0 * number + position + np.arange(np.prod(weight.shape))).reshape(weight.shape))
    return model


@pytest.fixture
def run(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    wanted = []
    with SnapshotStore(tmp_path / "run", "w") as store:
        for index in (1, 2, 3):
            arrays = Copy(named_weights(vary(model, index))).resolve()
            store.save(arrays, index=index, step=index, cycle=index - 1, lr=0.1, framework="tensorflow")
            wanted.append(softmax64(model(X)))
    return tmp_path / "run", model, np.array(wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_normalization_is_by_what_each_member_was_adapted_to(strategy):
    layer = layers.Normalization()
    model = keras.Sequential([keras.Input((4,)), layer, layers.Dense(3)])
    given, wanted = [], []
    for data in (X, 3 * X + 7):
        layer.adapt(data)
        given.append(model.get_weights())
        wanted.append(softmax64(model(X)))
    fresh = keras.Sequential([keras.Input((4,)), layers.Normalization(), layers.Dense(3)])
    for architecture in (model, fresh):
        ensemble = SnapshotEnsemble(given, architecture, strategy=strategy)
        np.testing.assert_allclose(ensemble.members(X), wanted, atol=1e-6)
        np.testing.assert_allclose(ensemble(X), np.mean(wanted, 0), atol=1e-6)


class Elsewhere(keras.Model):
    """Runs other weights than those it says it has."""

    live = tf.Variable(np.sin(np.arange(12.0, dtype=np.float32)).reshape(4, 3))

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3)

    def build(self, shape):
        self.out.build(shape)

    def call(self, x):
        return tf.matmul(x, self.live)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_members_that_all_give_the_same_though_their_weights_differ_are_refused(strategy):
    model = Elsewhere()
    model(X)
    given = [vary(model, number).get_weights() for number in range(2)]
    with pytest.raises(DataError, match="weights differ, yet their outputs are bit-equal"):
        SnapshotEnsemble(given, model, strategy=strategy)(X)
    assert SnapshotEnsemble(given, model, strategy=strategy, allow_equal=True)(X).shape == (6, 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_softmax_is_over_the_axis_of_the_classes_and_one_axis_is_refused(strategy):
    images = np.sin(np.arange(2 * 5 * 7 * 4, dtype=np.float32)).reshape(2, 5, 7, 4)
    model = keras.Sequential([keras.Input((5, 7, 4)), layers.Conv2D(3, 1), layers.Permute((3, 1, 2))])
    given = [vary(model, number).get_weights() for number in range(2)]
    wanted = np.mean([softmax64(vary(model, number)(images), 1) for number in range(2)], 0)
    found = SnapshotEnsemble(given, model, axis=1, strategy=strategy)(images)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    flat = keras.Sequential([keras.Input((4,)), layers.Dense(1), layers.Reshape(())])
    with pytest.raises(DataError, match=r"got shape \(6,\): pass activation='sigmoid'"):
        SnapshotEnsemble([flat.get_weights()], flat, strategy=strategy)(X)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_model_returns_is_picked_from_or_refused_naming_output(strategy):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"seen": inputs, "logits": layers.Dense(3)(inputs)})
    given = [vary(model, 1).get_weights()]
    with pytest.raises(DataError, match=r"got dict: pass output='logits', or another of its keys \['seen', 'logits'\]"):
        SnapshotEnsemble(given, model, strategy=strategy)(X)
    found = SnapshotEnsemble(given, model, output="logits", strategy=strategy)(X)
    np.testing.assert_allclose(found, softmax64(model(X)["logits"]), atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_members_are_chosen_counted_yielded_and_pickled(run, strategy):
    directory, model, wanted = run
    ensemble = SnapshotEnsemble.load(directory, model, members=[3, 1], strategy=strategy)
    np.testing.assert_allclose(ensemble.members(X), wanted[[2, 0]], atol=1e-6)
    assert len(ensemble) == 2
    for member, probabilities in zip(ensemble, wanted[[2, 0]], strict=True):
        np.testing.assert_allclose(member(X), probabilities, atol=1e-6)
    again = pickle.loads(pickle.dumps(ensemble))
    np.testing.assert_allclose(again(X), wanted[[2, 0]].mean(0), atol=1e-6)
    assert (type(again), again.strategy) == (SnapshotEnsemble, strategy)


def test_a_damaged_member_may_be_left_out_and_batches_may_come_from_a_data_set(run):
    directory, model, wanted = run
    Path(directory, "snapshot-002.safetensors").write_bytes(b"?")
    with pytest.raises(CorruptSnapshotError, match=r"members=\[1, 3\] leaves it out"):
        SnapshotEnsemble.load(directory, model)
    ensemble = SnapshotEnsemble.load(directory, model, members=[1, 3], mapped=False)
    for batches in (tf.data.Dataset.from_tensor_slices((X, X[:, 0])).batch(4), [(X[:4], None), (X[4:], None)], X):
        np.testing.assert_allclose(ensemble.predict(batches), wanted[[0, 2]].mean(0), atol=1e-6)
    with pytest.raises(DataError, match="mapped=True is for PyTorch alone"):
        SnapshotEnsemble.load(directory, model, mapped=True)
