"""The ensemble is the mean of its members' probabilities, whatever kind of Keras model they are members of."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, losses, ops

from snapcore import CorruptSnapshotError, DataError, StoreError
from snapcore.store import SnapshotStore
from snapcore_keras import SnapshotEnsemble
from snapcore_keras.state import Copy, named_weights

X = np.linspace(-2, 2, 18, dtype=np.float32).reshape(6, 3)


def write(directory, *members, framework="keras", unfinished=()):
    with SnapshotStore(directory, "w") as store:
        for index, tensors in enumerate(members, 1):
            entry = {"index": index, "step": index, "cycle": index - 1, "lr": 0.1, "framework": framework}
            store.save(tensors, **entry, unfinished=index in unfinished)
    return directory


def varied(model, number):
    """Give a model the weights of a member, and return them as a member's file holds them."""
    for position, weight in enumerate(model.weights):
        waves = np.sin(3.0 * number + position + np.arange(np.prod(weight.shape))).reshape(weight.shape)
        weight.assign(1.5 + waves if "variance" in weight.path else waves)
    return Copy(named_weights(model)).resolve()


def softmax64(logits):
    """The textbook formula in NumPy, float64."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def members_of(model, count=3, x=X, activation=softmax64):
    """Members, and the probabilities that the model itself gives with the weights of each."""
    tensors, probabilities = [], []
    for number in range(count):
        tensors.append(varied(model, number))
        outputs = model(x, training=False)
        probabilities.append(activation(ops.convert_to_numpy(outputs).astype(np.float64)))
    model.set_weights([np.full(weight.shape, 0.5) for weight in model.weights])
    return tensors, np.array(probabilities)


def sequential(*, last=None):
    return keras.Sequential([keras.Input((3,)), layers.Dense(5, activation="relu"), last or layers.Dense(4)])


def built_late():
    model = keras.Sequential([layers.Dense(5, activation="relu"), layers.Dense(4)])
    model(X)
    return model


def functional():
    inputs = keras.Input((3,))
    hidden = layers.Dense(3, activation="tanh")(inputs)
    return keras.Model(inputs, layers.Dense(4)(layers.Add()([inputs, hidden])))


def with_statistics():
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(5), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(4)]
    )


def tied():
    inputs, shared = keras.Input((3,)), layers.Dense(3)
    return keras.Model(inputs, layers.Dense(4)(shared(ops.tanh(shared(inputs)))))


def nested():
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(4)(with_statistics()(inputs)))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """With weights of its own, and random layers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.hidden = layers.Dense(5, activation="relu")
        self.norm = layers.BatchNormalization()
        self.dropout = layers.Dropout(0.5)
        self.out = layers.Dense(4)
        self.scale = self.add_weight((4,), "ones", name="scale")

    def call(self, x, training=False):
        hidden = self.norm(self.hidden(x), training=training)
        return self.out(self.dropout(hidden, training=training)) * self.scale


class Tied(keras.Model):
    """Whose one matrix leads in and out."""

    def __init__(self):
        super().__init__()
        self.matrix = self.add_weight((3, 3), "ones")
        self.again = self.matrix

    def call(self, x):
        return ops.matmul(ops.tanh(ops.matmul(x, self.matrix)), ops.transpose(self.again))


def called(model):
    model(X)
    return model


MODELS = {
    "sequential": sequential,
    "built late": built_late,
    "functional": functional,
    "batch normalisation and dropout": with_statistics,
    "a layer twice": tied,
    "a model in a model": nested,
    "subclassed": lambda: called(Subclassed()),
    "subclassed and tied": lambda: called(Tied()),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_mean_of_the_softmax_of_its_members(tmp_path, name):
    model = MODELS[name]()
    tensors, wanted = members_of(model)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    np.testing.assert_allclose(ensemble(X), wanted.mean(0), atol=1e-6)
    each = ensemble.members(X)
    assert (each.shape, each.dtype, len(ensemble)) == (wanted.shape, tf.float32, 3)
    np.testing.assert_allclose(each, wanted, atol=1e-6)
    assert not np.array_equal(each[0], each[1])


@pytest.mark.parametrize("name", ["sequential", "batch normalisation and dropout", "subclassed"])
def test_predict_gives_the_same_of_any_number_of_examples(tmp_path, name):
    model = MODELS[name]()
    tensors, wanted = members_of(model)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    for rows in (6, 5):
        found = ensemble.predict(X[:rows], batch_size=4)
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, wanted.mean(0)[:rows], atol=1e-6)


def test_predict_takes_examples_of_another_shape_and_kind_after_the_first():
    inputs = keras.Input((None, 3))
    known = keras.Model(inputs, layers.Dense(4)(layers.GlobalMaxPooling1D()(inputs)))

    class Unknown(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = layers.Dense(4)

        def call(self, x):
            return self.out(ops.max(ops.cast(x, "float32"), 1))

    unknown = Unknown()
    unknown(np.zeros((1, 2, 3)))
    for model in (known, unknown):
        members_of(model, 1, x=np.zeros((1, 2, 3)))
        varied(model, 1)
        ensemble = SnapshotEnsemble([model.get_weights()], model)
        for length, dtype in ((2, np.float32), (7, np.float32), (5, np.int32), (2, np.float64)):
            x = (8 * np.sin(np.arange(4 * length * 3))).reshape(4, length, 3).astype(dtype)
            wanted = softmax64(np.asarray(model(x), np.float64))
            np.testing.assert_allclose(ensemble.predict(x, batch_size=3), wanted, atol=1e-5)


@pytest.mark.parametrize("batch", [X[:0], [X[:0], X], {"x": X[:0]}])
def test_predict_needs_examples(batch):
    model = sequential()
    with pytest.raises(DataError, match=r"at least one example, got x of shape \[\(0, 3\)"):
        SnapshotEnsemble([model.get_weights()], model).predict(batch)


@pytest.fixture
def run(tmp_path):
    model = sequential()
    tensors, wanted = members_of(model, 4)
    return write(tmp_path / "run", *tensors), model, wanted


@pytest.mark.parametrize("last", [None, 4, 3, 1])
def test_the_last_members_are_used(run, last):
    directory, model, wanted = run
    ensemble = SnapshotEnsemble.load(directory, model, last=last)
    assert len(ensemble) == (last or 4)
    np.testing.assert_allclose(ensemble(X), wanted[-(last or 4) :].mean(0), atol=1e-6)


@pytest.mark.parametrize("last", [0, 5, -1])
def test_more_members_than_there_are_are_refused(run, last):
    with pytest.raises(StoreError, match=r"last must be in 1\.\.4"):
        SnapshotEnsemble.load(run[0], run[1], last=last)


def test_the_last_of_each_of_several_runs_are_used(tmp_path):
    model = sequential()
    tensors, wanted = members_of(model, 5)
    directories = write(tmp_path / "a", *tensors[:3]), write(tmp_path / "b", *tensors[3:])
    ensemble = SnapshotEnsemble.load(directories, model, last=2)
    np.testing.assert_allclose(ensemble.members(X), wanted[[1, 2, 3, 4]], atol=1e-6)


def test_unfinished_members_are_left_out(tmp_path):
    model = sequential()
    tensors, wanted = members_of(model, 2)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors, unfinished=(2,)), model)
    np.testing.assert_allclose(ensemble(X), wanted[0], atol=1e-6)
    with pytest.raises(StoreError, match="no finished member"):
        SnapshotEnsemble.load(write(tmp_path / "none", tensors[0], unfinished=(1,)), model)


def test_members_of_another_framework_are_refused(tmp_path):
    model = sequential()
    directory = write(tmp_path / "run", varied(model, 0), framework="tensorflow")
    with pytest.raises(DataError, match="written by tensorflow, not by keras: load it with snapcore_tensorflow"):
        SnapshotEnsemble.load(directory, model)


def test_a_file_that_was_changed_is_refused(run):
    directory, model, _ = run
    file = SnapshotStore(directory).file(2)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptSnapshotError):
        SnapshotEnsemble.load(directory, model)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: sequential(last=layers.Dense(7)), r"'002/dense/kernel' is \(5, 4\), the model's is \(5, 7\)"),
        (with_statistics, r"7 differences\): '004.*kernel' .* is missing|'004/.*' .* is missing"),
        (lambda: keras.Sequential([keras.Input((3,)), layers.Dense(5)]), "'002/dense/kernel' .* is not in the model"),
    ],
)
def test_another_model_is_refused_naming_the_first_difference(run, other, message):
    with pytest.raises(DataError, match=message):
        SnapshotEnsemble.load(run[0], other())


def test_a_model_without_weights_is_refused(run):
    with pytest.raises(DataError, match="build it first"):
        SnapshotEnsemble.load(run[0], Subclassed.__base__())


def test_the_model_is_left_alone_and_may_be_trained_on(tmp_path):
    model = with_statistics()
    tensors, wanted = members_of(model)
    before = [ops.convert_to_numpy(variable).tobytes() for variable in model.variables]
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    ensemble(X), ensemble.members(X), ensemble.predict(X), ensemble.tune(X, rounds=1)
    assert [ops.convert_to_numpy(variable).tobytes() for variable in model.variables] == before
    assert (model.compiled, model.trainable, len(model.trainable_variables)) == (False, True, 6)
    model.layers[0].trainable = False
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(X, np.arange(6) % 4, verbose=0)
    assert [ops.convert_to_numpy(variable).tobytes() for variable in model.variables] != before
    np.testing.assert_allclose(ensemble(X), wanted.mean(0), atol=1e-6)


def test_a_model_that_got_other_weights_meanwhile_is_refused(run):
    directory, model, _ = run
    ensemble = SnapshotEnsemble.load(directory, model)
    model.add(layers.Dense(4))
    with pytest.raises(DataError, match="has got other weights since"):
        ensemble(X)


def test_dropout_stays_off_whatever_is_asked_for(run):
    model = called(Subclassed())
    ensemble = SnapshotEnsemble([model.get_weights()], model)
    np.testing.assert_array_equal(ensemble(X, training=True), ensemble(X))


def test_members_may_be_given_as_keras_gives_weights():
    model = with_statistics()
    members_of(model)
    given = []
    for number in range(2):
        varied(model, number)
        given.append(model.get_weights())
    ensemble = SnapshotEnsemble(given, model)
    np.testing.assert_allclose(ensemble(X), members_of(model, 2)[1].mean(0), atol=1e-6)
    with pytest.raises(StoreError, match="at least one finished member"):
        SnapshotEnsemble([], model)
    with pytest.raises(DataError, match=r"member 2 does not fit the model .* is missing"):
        SnapshotEnsemble([given[0], given[1][:-1]], model)
    with pytest.raises(DataError, match=r"member 1 does not fit the model .* is not in the model"):
        SnapshotEnsemble([[*given[0], np.zeros(3)]], model)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_half_precision_is_computed_as_the_model_does_and_averaged_in_float32(tmp_path, policy):
    callers = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = called(Subclassed())
        tensors, wanted = members_of(model)
        ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
        assert model(X).dtype == tf.bfloat16
        # What is compiled may keep more digits between two operations.
        for found, atol in ((ensemble(X), 1e-6), (ensemble.functional(X)(X), 1e-6), (ensemble.predict(X), 1e-2)):
            assert found.dtype in (tf.float32, np.float32)
            np.testing.assert_allclose(found, wanted.mean(0), atol=atol)
    finally:
        keras.config.set_dtype_policy(callers)


def test_bfloat16_members_are_held_bit_for_bit(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, dtype="bfloat16")])
    tensors, _ = members_of(model, 2)
    assert {array.dtype.name for array in tensors[0].values()} == {"bfloat16"}
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    held = ensemble.functional().get_weights()
    written = [array for member in tensors for array in member.values()]
    assert [array.tobytes() for array in held] == [array.tobytes() for array in written]


def two_inputs(structure):
    inputs = {name: keras.Input((3,), name=name) for name in ("left", "right")}
    joined = layers.Concatenate()([inputs["left"], layers.Dense(2)(inputs["right"])])
    return keras.Model(structure(inputs), layers.Dense(4)(joined))


@pytest.mark.parametrize("structure", [dict, lambda inputs: list(inputs.values())], ids=["dict", "list"])
def test_a_model_may_have_several_inputs(tmp_path, structure):
    model, x = two_inputs(structure), structure({"left": X, "right": X[::-1].copy()})
    tensors, wanted = members_of(model, x=x)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    for found in (ensemble(x), ensemble.predict(x, batch_size=4), ensemble.functional()(x)):
        np.testing.assert_allclose(found, wanted.mean(0), atol=1e-6)


class Pair(keras.Model):
    """Takes two arguments by name, or a dict, and returns two tensors."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(4)

    def call(self, x, other=None):
        x, other = (x["x"], x["other"]) if isinstance(x, dict) else (x, other)
        return {"logits": self.out(x + 2 * other), "seen": x}


def test_arguments_go_to_the_model_and_output_picks_from_what_it_returns():
    model = Pair()
    model(X, other=X)
    model.out.set_weights([np.sin(np.arange(12.0)).reshape(3, 4), np.zeros(4)])
    wanted = softmax64((3 * X.astype(np.float64)) @ np.sin(np.arange(12.0)).reshape(3, 4))
    ensemble = SnapshotEnsemble([model.get_weights()], model, output=lambda outputs: outputs["logits"])
    both = {"x": X, "other": X}
    for found in (ensemble(X, other=X), ensemble(both), ensemble.predict(both), ensemble.functional(both)(both)):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    with pytest.raises(DataError, match="must return one tensor, got dict: pass output="):
        SnapshotEnsemble([model.get_weights()], model)(both)


@pytest.mark.parametrize("name", ["batch normalisation and dropout", "functional", "a model in a model", "subclassed"])
def test_the_functional_model_is_saved_and_exported_with_the_same_result(tmp_path, name):
    model = MODELS[name]()
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    tensors, wanted = members_of(model)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    one = ensemble.functional(None if name != "subclassed" else X)
    np.testing.assert_allclose(one(X), ensemble(X), atol=1e-6)
    assert (one.trainable_weights, len(one.weights)) == ([], 3 * len(model.weights))
    one.save(tmp_path / "one.keras")
    one.export(tmp_path / "exported", verbose=False)
    model.set_weights([np.zeros(weight.shape) for weight in model.weights])
    again = keras.models.load_model(tmp_path / "one.keras")
    exported = tf.saved_model.load(tmp_path / "exported")
    for rows in (6, 2):
        for reloaded in (again, exported.serve):
            np.testing.assert_allclose(reloaded(X[:rows]), wanted.mean(0)[:rows], atol=1e-6)


def test_it_is_a_layer_of_a_model_that_is_being_built(run):
    directory, model, wanted = run
    inputs = keras.Input((3,))
    outer = keras.Model(inputs, layers.Rescaling(2.0)(SnapshotEnsemble.load(directory, model)(inputs)))
    np.testing.assert_allclose(outer(X), 2 * wanted.mean(0), atol=1e-6)


def test_a_model_that_does_not_say_its_inputs_needs_a_batch():
    model = called(Subclassed())
    with pytest.raises(DataError, match="does not say what its inputs are: pass one batch"):
        SnapshotEnsemble([model.get_weights()], model).functional()


def test_inputs_may_be_integers(tmp_path):
    inputs = keras.Input((5,), dtype="int32")
    words = layers.Embedding(7, 3, mask_zero=True)(inputs)
    model, x = keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(words))), np.arange(15).reshape(3, 5)
    x %= 7
    tensors, wanted = members_of(model, x=x)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    for found in (ensemble(x), ensemble.predict(x)):
        np.testing.assert_allclose(found, wanted.mean(0), atol=1e-6)


def test_what_the_backend_cannot_do_is_refused_by_name(run):
    directory, model, _ = run
    with pytest.raises(DataError, match="'stacked' needs Keras to run on jax or torch, got tensorflow"):
        SnapshotEnsemble.load(directory, model, strategy="stacked")
    with pytest.raises(DataError, match=r"strategy must be one of \['loop', 'stacked'\], got 'graph'"):
        SnapshotEnsemble.load(directory, model, strategy="graph")
    with pytest.raises(DataError, match="like must be left out"):
        SnapshotEnsemble.load(directory, model, like=model)


def test_tuning_reports_what_it_found_and_keeps_the_fastest(run):
    directory, model, wanted = run
    ensemble = SnapshotEnsemble.load(directory, model)
    report = ensemble.tune(X, rounds=1)
    assert (list(report), report.chosen, ensemble.strategy) == (["loop", "stacked"], "loop", "loop")
    assert "needs Keras to run on jax or torch" in report["stacked"].refused
    np.testing.assert_allclose(ensemble(X), wanted.mean(0), atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_members_are_the_same_on_every_backend_and_by_every_strategy(tmp_path, backend):
    model = with_statistics()
    tensors, wanted = members_of(model)
    write(tmp_path / "run", *tensors)
    np.savez(tmp_path / "wanted.npz", x=X, probabilities=wanted)
    script = Path(__file__).with_name("ensemble_on_a_backend.py")
    done = subprocess.run([sys.executable, script, backend, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    strategies = ["loop", "stacked", "predict", "saved", "tuned"]
    held = ["lengths", "errors", "refused", "amid", "bfloat16", "follows", "elsewhere", "again"]
    assert done.stdout.split() == [*strategies, *held]
