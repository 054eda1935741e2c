"""Members run their own weights, with all that follows from these, and are averaged as what they are; or refused."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers, ops

from snapcore import CorruptSnapshotError, DataError
from snapcore.store import SnapshotStore
from snapcore_keras import SnapshotEnsemble
from snapcore_keras.members import fitted_weights
from snapcore_keras.state import Copy, named_weights

from .conftest import process

X = np.random.default_rng(0).normal(50, 10, (6, 4)).astype(np.float32)
WORDS = np.array([["red", "green"], ["blue", "red"], ["green", "grey"]])


def write(directory, *members, framework="keras"):
    with SnapshotStore(directory, "w") as store:
        for index, tensors in enumerate(members, 1):
            store.save(tensors, index=index, step=index, cycle=index - 1, lr=0.1, framework=framework)
    return directory


def softmax64(logits, axis=-1):
    """The textbook formula in NumPy, float64."""
    powers = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def vary(model, number):
    """Give a model other weights, but for what it has been adapted to."""
    for position, weight in enumerate(model.weights):
        if "normalization" not in weight.path and "count" not in weight.path:
            waves = np.sin(3.0 * number + position + np.arange(np.prod(weight.shape))).reshape(weight.shape)
            weight.assign(waves)
    return model


def members_of(model, x, count=2, axis=-1):
    """Members as their files hold them, and the probabilities that the model itself gives with the weights of each."""
    tensors, probabilities = [], []
    for number in range(count):
        vary(model, number)
        tensors.append(Copy(named_weights(model)).resolve())
        probabilities.append(softmax64(model(x, training=False), axis))
    return tensors, np.array(probabilities)


def sequential(layer):
    return keras.Sequential([keras.Input((4,)), layer, layers.Dense(3)])


def within(layer):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3)(keras.Sequential([keras.Input((4,)), layer])(inputs)))


@keras.saving.register_keras_serializable(package="tests")
class WithLayer(keras.Model):
    def __init__(self, layer, **options):
        super().__init__(**options)
        self.first, self.out = layer, layers.Dense(3)

    def call(self, x):
        return self.out(self.first(x))

    def get_config(self):
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.first)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("layer")), **config)


def subclassed(layer):
    layer.build(X.shape)  # which Keras does in a graph otherwise
    model = WithLayer(layer)
    model(X)
    return model


@pytest.mark.parametrize("make", [sequential, within, subclassed])
@pytest.mark.parametrize("axis", [-1, None])
def test_normalization_is_by_what_each_member_was_adapted_to(tmp_path, make, axis):
    """Keras computes it from weights when it loads them, and keeps it beside them."""
    trained, layer = None, layers.Normalization(axis=axis)
    tensors, wanted = [], []
    for number, data in enumerate((X, 3 * X + 7)):
        trained = trained or make(layer)
        layer.adapt(data)
        vary(trained, number)
        tensors.append(Copy(named_weights(trained)).resolve())
        wanted.append(softmax64(trained(X)))
    directory = write(tmp_path / "run", *tensors)
    for model in (trained, make(layers.Normalization(axis=axis))):
        before = np.asarray(model(X))
        ensemble = SnapshotEnsemble.load(directory, model, activation="softmax")
        np.testing.assert_allclose(ensemble.members(X), wanted, atol=1e-6)
        np.testing.assert_allclose(ensemble.predict(X, batch_size=4), np.mean(wanted, 0), atol=1e-6)
        np.testing.assert_allclose(tf.function(ensemble, autograph=False)(X), np.mean(wanted, 0), atol=1e-6)
        saved = ensemble.functional(X)
        saved.save(tmp_path / "e.keras")
        np.testing.assert_allclose(keras.models.load_model(tmp_path / "e.keras")(X), np.mean(wanted, 0), atol=1e-6)
        np.testing.assert_array_equal(model(X), before)  # the model has its own again


@keras.saving.register_keras_serializable(package="tests")
class Halved(layers.Layer):
    """Computes from its weight, when it is loaded, what its call uses."""

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], 3), "ones", name="kernel")
        self.finalize_state()

    def finalize_state(self):
        self.half = self.kernel / 2

    def call(self, x):
        return ops.matmul(x, self.half)


def test_a_layer_of_your_own_computes_anew_what_follows_from_its_weights():
    model = keras.Sequential([keras.Input((4,)), Halved()])
    given = [np.sin(number + np.arange(12.0)).reshape(4, 3) for number in range(2)]
    found = SnapshotEnsemble([[kernel] for kernel in given], model).members(X / 50)
    np.testing.assert_allclose(found, [softmax64(X / 50 @ kernel / 2) for kernel in given], atol=1e-6)


def adapted_strings():
    layer = layers.StringLookup()
    layer.adapt(["red", "green", "blue"])
    return layer


def adapted_text():
    layer = layers.TextVectorization(output_sequence_length=2)
    layer.adapt(["red green", "blue"])
    return layer


def weighted_text():
    layer = layers.TextVectorization(output_mode="tf_idf")
    layer.adapt(["red green", "blue red"])
    return layer


def of_words(layer):
    inputs = (
        keras.Input((), dtype="string")
        if isinstance(layer, layers.TextVectorization)
        else keras.Input((2,), dtype="string")
    )
    found = layer(inputs)
    if getattr(layer, "_output_mode", "int") == "int":
        found = layers.Flatten()(layers.Embedding(9, 3)(found))
    return keras.Model(inputs, layers.Dense(3)(found)), WORDS[:, 0] if inputs.shape == (None,) else WORDS


@pytest.mark.exhaustive(keep=1)
@pytest.mark.filterwarnings("ignore:.*np.object:FutureWarning")
@pytest.mark.parametrize("make", [adapted_strings, adapted_text])
def test_a_vocabulary_is_the_given_models_and_is_saved_and_exported_with_the_ensemble(tmp_path, make):
    model, x = of_words(make())
    tensors, wanted = members_of(model, tf.constant(x))
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    np.testing.assert_allclose(ensemble.members(tf.constant(x)), wanted, atol=1e-6)
    functional = ensemble.functional()
    functional.save(tmp_path / "e.keras")
    loaded = keras.models.load_model(tmp_path / "e.keras")
    np.testing.assert_allclose(loaded(tf.constant(x)), wanted.mean(0), atol=1e-6)
    functional.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(tf.constant(x)), wanted.mean(0), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*np.object:FutureWarning")
def test_weights_of_words_are_the_given_models_and_refused_when_saved(tmp_path):
    model, x = of_words(weighted_text())
    tensors, wanted = members_of(model, tf.constant(x))
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    np.testing.assert_allclose(ensemble.members(tf.constant(x)), wanted, atol=1e-6)
    with pytest.raises(DataError, match="weighs words by tf-idf, which an ensemble cannot save"):
        ensemble.functional().save(tmp_path / "e.keras")


@pytest.mark.parametrize("layer", [layers.StringLookup, lambda: layers.TextVectorization(output_sequence_length=2)])
def test_a_vocabulary_that_is_not_there_is_refused(layer):
    model, _ = of_words(layer())
    with pytest.raises(DataError, match=r"has no vocabulary, and members hold none: adapt it, or pass vocabulary="):
        SnapshotEnsemble([model.get_weights()], model)


def test_boundaries_and_integers_are_the_given_models(tmp_path):
    numbers = layers.Discretization(num_bins=3)
    numbers.adapt(X)
    integers = layers.IntegerLookup()
    integers.adapt([0, 1, 2])
    model = keras.Sequential(
        [keras.Input((4,)), numbers, integers, layers.Embedding(9, 3), layers.Flatten(), layers.Dense(3)]
    )
    tensors, wanted = members_of(model, X)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    np.testing.assert_allclose(ensemble.members(X), wanted, atol=1e-6)
    ensemble.functional().save(tmp_path / "e.keras")
    np.testing.assert_allclose(keras.models.load_model(tmp_path / "e.keras")(X), wanted.mean(0), atol=1e-6)


@pytest.mark.parametrize("layer", [layers.LSTM, layers.GRU])
def test_states_that_are_kept_from_batch_to_batch_are_refused(layer):
    """They are the given model's, and no weights."""
    model = keras.Sequential([keras.Input(batch_shape=(2, 3, 4)), layer(5, stateful=True), layers.Dense(3)])
    with pytest.raises(DataError, match="keeps states from batch to batch: build the model with stateful=False"):
        SnapshotEnsemble([model.get_weights()], model)
    again = keras.Sequential([keras.Input((3, 4)), layer(5), layers.Dense(3)])
    again.set_weights(model.get_weights())
    x = np.sin(np.arange(24.0, dtype=np.float32)).reshape(2, 3, 4)
    found = SnapshotEnsemble([model.get_weights()], again)(x)
    np.testing.assert_allclose(found, softmax64(again(x)), atol=1e-6)


def test_a_saved_model_within_a_model_is_refused(tmp_path):
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    inner.export(tmp_path / "inner", verbose=False)
    model = keras.Sequential([keras.Input((4,)), layers.TFSMLayer(tmp_path / "inner", call_endpoint="serve")])
    with pytest.raises(DataError, match="is a TFSMLayer, which runs weights of its own: assign each member by"):
        SnapshotEnsemble([model.get_weights()], model)


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


@pytest.mark.parametrize("activation", ["auto", "identity", "sigmoid"])
@pytest.mark.parametrize("method", ["__call__", "members", "predict", "tune"])
def test_members_that_all_give_the_same_though_their_weights_differ_are_refused(activation, method):
    model = Elsewhere()
    model(X)
    given = [vary(model, number).get_weights() for number in range(3)]
    ensemble = SnapshotEnsemble(given, model, activation=activation)
    for _ in range(2):
        with pytest.raises(
            DataError, match="weights differ, yet their outputs are bit-equal: pass a freshly built model"
        ):
            getattr(ensemble, method)(X / 50)
    assert SnapshotEnsemble(given, model, activation=activation, allow_equal=True)(X).shape == (6, 3)
    assert SnapshotEnsemble([given[0]] * 2, model, activation=activation)(X).shape == (6, 3)


def test_equal_members_are_noticed_within_a_graph_too_and_zeros_of_no_bias_decide_nothing():
    model = Elsewhere()
    model(X)
    given = [vary(model, number).get_weights() for number in range(2)]
    ensemble = SnapshotEnsemble(given, model)
    assert tf.function(ensemble, autograph=False)(X).shape == (6, 3)  # which has no bias: zeros are zeros
    with pytest.raises(DataError, match="bit-equal"):
        ensemble(X / 50)


def dense():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3)])


@pytest.fixture
def run(tmp_path):
    model = dense()
    tensors, wanted = members_of(model, X / 50, 3)
    return write(tmp_path / "run", *tensors), model, wanted


def test_members_are_chosen_by_their_indices_and_a_damaged_one_may_be_left_out(run):
    directory, model, wanted = run
    found = SnapshotEnsemble.load(directory, model, members=[3, 1]).members(X / 50)
    np.testing.assert_allclose(found, wanted[[2, 0]], atol=1e-6)
    Path(directory, "snapshot-002.safetensors").write_bytes(b"?")
    with pytest.raises(CorruptSnapshotError, match=r"members=\[1, 3\] leaves it out"):
        SnapshotEnsemble.load(directory, model)
    found = SnapshotEnsemble.load([directory, directory], model, members=[1, 3]).members(X / 50)
    np.testing.assert_allclose(found, wanted[[0, 2, 0, 2]], atol=1e-6)
    with pytest.raises(DataError, match="either last or members must be left out"):
        SnapshotEnsemble.load(directory, model, members=[1], last=1)


def test_what_changes_a_file_in_place_does_not_reach_a_loaded_ensemble(run):
    directory, model, wanted = run
    ensemble = SnapshotEnsemble.load(directory, model, mapped=False)
    for file in Path(directory).glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.seek(-32, os.SEEK_END)
            opened.write(np.full(8, 9, np.float32).tobytes())
    np.testing.assert_allclose(ensemble.members(X / 50), wanted, atol=1e-6)
    with pytest.raises(DataError, match="mapped=True is for PyTorch alone"):
        SnapshotEnsemble.load(directory, model, mapped=True)


class Legacy:
    """As a model of tf_keras is, which is no layer of Keras 3."""

    def __init__(self):
        self.weights = [1]


Legacy.__module__ = "tf_keras.src.engine.sequential"


def test_what_is_no_model_of_keras_3_is_refused_in_one_line(run):
    for wrong, name in (
        (Legacy(), "Legacy of tf_keras"),
        (torch.nn.Linear(4, 3), "Linear of torch"),
        (None, "NoneType"),
    ):
        for make in (lambda m: SnapshotEnsemble([], m), lambda m: SnapshotEnsemble.load(run[0], m)):
            with pytest.raises(DataError, match=rf"^must|model of Keras 3, got {name}.*: build it with keras"):
                make(wrong)


class Pair(keras.Model):
    """Returns what a structure makes of its logits."""

    def __init__(self, structure):
        super().__init__()
        self.out, self.structure = layers.Dense(3), structure

    def call(self, x):
        return self.structure(self.out(x))


@pytest.mark.parametrize(
    ("structure", "cure", "output"),
    [
        (lambda z: {"hidden": z * 2, "logits": z}, r"dict: pass output='logits', or another of its keys", "logits"),
        (lambda z: (z, z * 2), r"tuple: pass output=0, or another position in 0\.\.1", 0),
        (lambda z: [z, z * 2], r"list: pass output=0", 0),
    ],
)
def test_what_a_model_returns_is_picked_from_or_refused_naming_output(structure, cure, output):
    model = Pair(structure)
    model(X)
    vary(model, 1)
    for ask in (lambda e: e(X / 50), lambda e: e.predict(X / 50), lambda e: e.functional(X / 50)):
        with pytest.raises(DataError, match=rf"the model must return one tensor, got {cure}"):
            ask(SnapshotEnsemble([model.get_weights()], model))
    ensemble = SnapshotEnsemble([model.get_weights()], model, output=output)
    wanted = softmax64(model.out(X / 50))
    for found in (ensemble(X / 50), ensemble.predict(X / 50), ensemble.functional(X)(X / 50)):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_softmax_is_over_the_axis_of_the_classes(tmp_path):
    images = np.sin(np.arange(2 * 5 * 7 * 4, dtype=np.float32)).reshape(2, 5, 7, 4)
    last = keras.Sequential([keras.Input((5, 7, 4)), layers.Conv2D(3, 1)])
    tensors, wanted = members_of(last, images)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "last", *tensors), last)
    np.testing.assert_allclose(ensemble(images), wanted.mean(0), atol=1e-6)
    first = keras.Sequential([keras.Input((5, 7, 4)), layers.Conv2D(3, 1), layers.Permute((3, 1, 2))])
    tensors, wanted = members_of(first, images, axis=1)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "first", *tensors), first, axis=1)
    for found in (ensemble(images), ensemble.predict(images), ensemble.functional()(images)):
        np.testing.assert_allclose(found, wanted.mean(0), atol=1e-6)
    ensemble.functional().save(tmp_path / "e.keras")
    np.testing.assert_allclose(keras.models.load_model(tmp_path / "e.keras")(images), wanted.mean(0), atol=1e-6)
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(DataError, match="may be its axis 1 or its last: pass axis=1 or axis=-1"):
            SnapshotEnsemble.load(tmp_path / "first", first)(images)
        np.testing.assert_allclose(ensemble(images), wanted.mean(0), atol=1e-6)
    finally:
        keras.config.set_image_data_format("channels_last")


def squeezed():
    return keras.Sequential([keras.Input((4,)), layers.Dense(1), layers.Reshape(())])


def test_one_axis_is_that_of_the_batch_and_refused():
    model = squeezed()
    given = [vary(model, number).get_weights() for number in range(2)]
    for ask in (lambda e: e(X / 50), lambda e: e.predict(X / 50), lambda e: e.functional()):
        with pytest.raises(
            DataError, match=r"needs outputs \[batch, classes\], got shape .*: pass activation='sigmoid'"
        ):
            ask(SnapshotEnsemble(given, model))
    found = SnapshotEnsemble(given, model, activation="sigmoid")(X / 50)
    assert found.shape == (6,)


def test_batches_may_come_from_a_data_set_or_a_loader(run):
    directory, model, wanted = run
    ensemble, x, y = SnapshotEnsemble.load(directory, model), X / 50, np.arange(6)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, position):
            return x[3 * position : 3 * position + 3], y[3 * position : 3 * position + 3]

    pairs = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    loaders = [
        tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
        tf.data.Dataset.from_tensor_slices(x).batch(4),
        Batches(),
        torch.utils.data.DataLoader(pairs, batch_size=4),
        [(x[:4], y[:4]), (x[4:], y[4:])],
        [x[:4], x[4:]],
        iter([(x, y, None)]),
        x,
        tf.constant(x),
    ]
    for loader in loaders:
        found = ensemble.predict(loader)
        assert (type(found), found.dtype) == (np.ndarray, np.float32)
        np.testing.assert_allclose(found, wanted.mean(0), atol=1e-6)
    for nothing, message in (([], "at least one batch, got none"), ([x[:0]], "at least one example"), (3, "got int")):
        with pytest.raises(DataError, match=message):
            ensemble.predict(nothing)


def test_a_list_is_the_inputs_of_a_model_that_takes_several(tmp_path):
    inputs = [keras.Input((4,)), keras.Input((4,))]
    model = keras.Model(inputs, layers.Dense(3)(layers.Subtract()(inputs)))
    x = [X / 50, X[::-1] / 25]
    tensors, wanted = members_of(model, x)
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *tensors), model)
    for given in (x, [(x, "labels")], [({"a": 1}, 0)][:0] or iter([(x,)])):
        np.testing.assert_allclose(ensemble.predict(given), wanted.mean(0), atol=1e-6)


def test_it_has_a_length_and_yields_its_members(run, tmp_path):
    directory, model, wanted = run
    ensemble = SnapshotEnsemble.load(directory, model)
    assert len(ensemble) == len(list(ensemble)) == 3
    for number, (member, probabilities) in enumerate(zip(ensemble, wanted, strict=True)):
        np.testing.assert_allclose(member(X / 50), probabilities, atol=1e-6)
        np.testing.assert_allclose(member.predict([(X / 50, None)]), probabilities, atol=1e-6)
        assert len(member) == 1
        assert member._layer.members[0][0] is ensemble._layer.members[number][0]  # shared, not copied
        member.functional().save(tmp_path / "one.keras")
        np.testing.assert_allclose(keras.models.load_model(tmp_path / "one.keras")(X / 50), probabilities, atol=1e-6)


def half(outputs):
    return ops.sigmoid(outputs) / 2


OPTIONS = [{}, {"activation": "sigmoid", "axis": 1}, {"activation": half}, {"output": "logits"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("used", [False, True])
def test_it_pickles(run, options, used):
    directory, model, _ = run
    if "output" in options:
        inputs = keras.Input((4,))
        model = keras.Model(inputs, {"logits": layers.Dense(3)(inputs), "seen": inputs})
        ensemble = SnapshotEnsemble([vary(model, number).get_weights() for number in range(2)], model, **options)
    else:
        ensemble = SnapshotEnsemble.load(directory, model, **options)
    if used:
        ensemble(X / 50), ensemble.predict(X / 50)
    again = pickle.loads(pickle.dumps(ensemble))
    np.testing.assert_array_equal(again(X / 50), ensemble(X / 50))
    np.testing.assert_allclose(again.predict(X / 50), ensemble(X / 50), atol=1e-6)
    assert (len(again), again.strategy) == (len(ensemble), ensemble.strategy)


def with_statistics():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(4)]
    )


LOOP = Path(__file__).with_name("ensemble_of_a_loop.py")


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_members_that_a_loop_in_another_framework_wrote_are_loaded(tmp_path, backend):
    done = process([LOOP, tmp_path], backend)
    error = done.communicate()[1]
    assert done.returncode == 0, error
    given = np.load(tmp_path / "wanted.npz")
    for model in (with_statistics(), with_statistics()):
        found = SnapshotEnsemble.load(tmp_path / "run", model, activation="softmax").members(given["x"])
        np.testing.assert_allclose(found, given["probabilities"], atol=1e-5)


def arrays_of(model):
    return {
        weight.path: np.random.default_rng(position).normal(size=weight.shape)
        for position, weight in enumerate(model.weights)
    }


def test_names_of_pytorch_are_matched_by_paths_whatever_their_numbers():
    model = keras.Sequential([keras.Input((3,)), *(layers.Dense(3) for _ in range(12))])
    first = int(model.layers[0].name.partition("_")[2] or 0)
    given, wanted = {}, list(arrays_of(model).values())
    for (path, _), array in zip(arrays_of(model).items(), wanted, strict=True):
        _, layer, weight = path.split("/")
        number = int(layer.partition("_")[2] or 0) - first + 3
        given[f"_functional._torch_params.sequential_99/dense_{number}/{weight}"] = array
        given[f"_torch_params.sequential_99/dense_{number}/{weight}"] = array
    given["_torch_params.seed_generator/seed_generator_state"] = np.zeros(2)
    for found, array in zip(fitted_weights(model, given, "it"), wanted, strict=True):
        np.testing.assert_array_equal(found, array)
    with pytest.raises(DataError, match=r"does not fit the weights of .*: assign them by model\.set_weights"):
        fitted_weights(model, {**given, "_torch_params.sequential_99/dense_3/bias": np.zeros(2)}, "it")
    with pytest.raises(DataError, match="in no order of Keras' lists"):
        fitted_weights(model, {"_torch_params.sequential_99/dense_3/bias": np.zeros(3)}, "it")


def test_positions_of_jax_are_matched_by_shapes_or_refused():
    model = with_statistics()
    weights = {id(weight): np.random.default_rng(p).normal(size=weight.shape) for p, weight in enumerate(model.weights)}
    wanted = [weights[id(weight)] for weight in model.weights]

    def named(**lists):
        return {
            f"{prefix}/{position}": weights.get(id(variable), np.zeros(variable.shape))
            for prefix, variables in lists.items()
            for position, variable in enumerate(variables)
        }

    trained, others, all_others = model.trainable_variables, model.non_trainable_weights, model.non_trainable_variables
    for given in (
        named(params=trained, state=all_others),
        named(others=others, params=trained),
        named(a=model.weights),
        named(a=model.variables),
        {str(position): array for position, array in enumerate(wanted)},
        {weight.path: weights[id(weight)] for weight in model.weights},
    ):
        for found, array in zip(fitted_weights(model, given, "it"), wanted, strict=True):
            np.testing.assert_array_equal(found, array)
    with pytest.raises(DataError, match=r"fits .* in no order of Keras' lists: assign them by model\.set_weights"):
        fitted_weights(model, named(params=trained), "it")
    alike = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    ambiguous = {f"{prefix}/{position}": np.zeros(3) for prefix in "ab" for position in range(2)}
    with pytest.raises(DataError, match="in more than one order"):
        fitted_weights(alike, ambiguous, "it")
    many = keras.Sequential([keras.Input((3,)), *(layers.Dense(3) for _ in range(6))])  # more than ten arrays
    arrays = [np.random.default_rng(p).normal(size=weight.shape) for p, weight in enumerate(many.weights)]
    found = fitted_weights(many, {str(position): array for position, array in enumerate(arrays)}, "it")
    assert all(np.array_equal(one, other) for one, other in zip(found, arrays, strict=True))


@pytest.mark.exhaustive
def test_an_ensemble_is_unpickled_in_another_process(run, tmp_path):
    directory, model, wanted = run
    (tmp_path / "e.pickle").write_bytes(pickle.dumps(SnapshotEnsemble.load(directory, model)))
    np.save(tmp_path / "x.npy", X / 50)
    code = "import pickle, numpy as np; print(pickle.load(open('e.pickle', 'rb'))(np.load('x.npy')).numpy().tolist())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(eval(done.stdout), wanted.mean(0), atol=1e-6)
