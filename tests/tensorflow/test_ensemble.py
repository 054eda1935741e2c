"""The ensemble of TensorFlow's own loop: the same as Keras', in one graph that is traced once for every shape."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, losses, ops

from snapcore import DataError
from snapcore.store import SnapshotStore
from snapcore_keras.state import Copy, named_weights
from snapcore_tensorflow.ensemble import SnapshotEnsemble

X = np.linspace(-2, 2, 18, dtype=np.float32).reshape(6, 3)
STRATEGIES = ("loop", "xla")


def write(directory, *members, framework="tensorflow"):
    with SnapshotStore(directory, "w") as store:
        for index, tensors in enumerate(members, 1):
            store.save(tensors, index=index, step=index, cycle=index - 1, lr=0.1, framework=framework)
    return directory


def softmax64(logits):
    """The textbook formula in NumPy, float64."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def members_of(model, count=3):
    """Members, and the probabilities that the model itself gives with the weights of each."""
    tensors, probabilities = [], []
    for number in range(count):
        for position, weight in enumerate(model.weights):
            waves = np.sin(3.0 * number + position + np.arange(np.prod(weight.shape))).reshape(weight.shape)
            weight.assign(1.5 + waves if "variance" in weight.path else waves)
        tensors.append(Copy(named_weights(model)).resolve())
        probabilities.append(softmax64(np.asarray(model(X, training=False), np.float64)))
    model.set_weights([np.full(weight.shape, 0.5) for weight in model.weights])
    return tensors, np.array(probabilities)


class Counting(keras.Model):
    """Counts how often its Python is run."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.out = layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(4)
        self.runs = 0

    def call(self, x, training=False):
        self.runs += 1
        return self.out(self.dropout(self.norm(x, training=training), training=training))


def counting():
    model = Counting()
    model(X)
    return model


def sequential():
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(5), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(4)]
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", [sequential, counting])
def test_it_is_the_mean_of_the_softmax_of_its_members(tmp_path, make, strategy):
    model = make()
    tensors, wanted = members_of(model)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model, strategy=strategy)
    np.testing.assert_allclose(ensemble(X), wanted.mean(0), atol=1e-6)
    np.testing.assert_allclose(ensemble.members(X), wanted, atol=1e-6)
    np.testing.assert_allclose(ensemble(tf.constant(X[:2])), wanted.mean(0)[:2], atol=1e-6)
    np.testing.assert_allclose(ensemble.predict(X), wanted.mean(0), atol=1e-6)
    assert (len(ensemble), ensemble.strategy) == (3, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_traced_once_for_every_shape_of_batch(tmp_path, strategy):
    model = counting()
    tensors, wanted = members_of(model, 2)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model, strategy=strategy)
    ensemble(X)
    model.runs = 0
    for batch in (X, tf.constant(X), X[::-1].copy()):
        ensemble(batch)
    assert model.runs == 0
    for _ in range(2):
        ensemble(X[:4])
    assert model.runs == 2  # once for each member
    np.testing.assert_allclose(ensemble(X[::-1].copy()), wanted.mean(0)[::-1], atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_on_does_not_reach_the_members(tmp_path, strategy):
    model = sequential()
    tensors, wanted = members_of(model)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model, strategy=strategy)
    ensemble(X)
    before = [array.tobytes() for array in model.get_weights()]
    optimizer, loss = keras.optimizers.SGD(0.1), losses.SparseCategoricalCrossentropy(from_logits=True)
    with tf.GradientTape() as tape:
        value = loss(np.arange(6) % 4, model(X, training=True))
    optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
    assert [array.tobytes() for array in model.get_weights()] != before
    np.testing.assert_allclose(ensemble(X), wanted.mean(0), atol=1e-6)


def test_members_that_keras_wrote_are_refused(tmp_path):
    model = sequential()
    directory = write(tmp_path / "run", *members_of(model)[0], framework="keras")
    with pytest.raises(DataError, match="written by keras, not by tensorflow: load it with snapcore_keras"):
        SnapshotEnsemble.load(directory, model)


def test_tuning_compares_xla_with_the_loop(tmp_path):
    model = sequential()
    tensors, wanted = members_of(model)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    report = ensemble.tune(X, rounds=1)
    assert tuple(report) == STRATEGIES
    assert (report["xla"].refused, ensemble.strategy) == (None, report.chosen)
    assert report["xla"].deviation <= 1e-6
    np.testing.assert_allclose(ensemble(X), wanted.mean(0), atol=1e-6)


class Uncompilable(keras.Model):
    """Does what XLA has no kernel for."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(4)

    def call(self, x):
        return self.out(tf.strings.to_number(tf.strings.as_string(x)))


def test_a_model_that_xla_cannot_compile_is_refused_with_the_cure():
    model = Uncompilable()
    model(X)
    ensemble = SnapshotEnsemble([model.get_weights()], model, strategy="xla")
    with pytest.raises(DataError, match=r"cannot be run by XLA: (.|\n)*use strategy='loop'"):
        ensemble(X)
    ensemble = SnapshotEnsemble([model.get_weights()], model)
    np.testing.assert_allclose(ensemble(X), softmax64(np.asarray(model(X), np.float64)), atol=1e-5)
    report = ensemble.tune(X, rounds=1)
    assert (report.chosen, ensemble.strategy) == ("loop", "loop")
    assert "cannot be run by XLA" in report["xla"].refused


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_probabilities_are_noticed_before_the_graph_is_built(strategy):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Rescaling(1.0)(ops.softmax(layers.Dense(4)(inputs))))
    ensemble = SnapshotEnsemble([model.get_weights()], model, strategy=strategy)
    for _ in range(2):
        with pytest.raises(DataError, match="already are probabilities"):
            ensemble(X)


def test_it_may_be_called_within_a_graph_of_the_callers(tmp_path):
    model = sequential()
    tensors, wanted = members_of(model)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    np.testing.assert_allclose(tf.function(ensemble)(X), wanted.mean(0), atol=1e-6)


def test_it_is_exported_as_a_functional_model(tmp_path):
    model = counting()
    tensors, wanted = members_of(model)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    ensemble.functional(X).export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(X[:4]), wanted.mean(0)[:4], atol=1e-6)


def test_stacking_is_refused_by_name():
    model = sequential()
    with pytest.raises(DataError, match=r"strategy must be one of \['loop', 'xla'\], got 'stacked'"):
        SnapshotEnsemble([model.get_weights()], model, strategy="stacked")


def test_softmax_is_the_default_whatever_the_loss_says_and_probabilities_are_refused_at_the_first_use(tmp_path):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(4, activation="softmax")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy")
    directory = write(tmp_path / "run", *members_of(model, 1)[0])
    ensembles = SnapshotEnsemble.load(directory, model), SnapshotEnsemble([model.get_weights()], model)
    for ensemble in ensembles:
        with pytest.raises(DataError, match=r"already are probabilities.*activation='identity'"):
            ensemble(X)
    members = SnapshotEnsemble.load(directory, model, activation="identity")(X)
    np.testing.assert_array_equal(SnapshotEnsemble.load(directory, model, activation="auto")(X), members)


class Probable(Counting):
    """Gives probabilities in a way that nothing tells."""

    def call(self, x, training=False):
        return ops.softmax(super().call(x, training=training))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_probabilities_are_noticed_within_a_graph_of_the_callers(strategy):
    model = Probable()
    model(X)
    ensemble = SnapshotEnsemble([model.get_weights()], model, strategy=strategy)
    shapes = tf.TensorSpec((None, 3), tf.float32)
    for _ in range(2):
        with pytest.raises(DataError, match="already are probabilities"):
            tf.function(ensemble, input_signature=[shapes], autograph=False)(X)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_softmax_of_one_output_is_refused(strategy):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    with pytest.raises(DataError, match="softmax over one output is 1"):
        SnapshotEnsemble([model.get_weights()], model, strategy=strategy)(X)
