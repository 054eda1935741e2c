"""Log-probabilities, recipes and cascades: against NumPy and SciPy in float64, and the core's own predictions."""

import pickle
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops
from scipy import special

from snapcore import DataError
from snapcore.ensemble import Cascade, Predictions, Recipe, run_cascade
from snapcore.store import SnapshotStore
from snapcore_keras import SnapshotEnsemble

from .conftest import process

WEIGHTS = np.array([0.5, 0.0, 0.2, 0.3])
CASCADE = Cascade("probability", 0.7, (1.3, 1.2, 1.0))
RECIPE = Recipe(tuple(WEIGHTS), temperature=2.5, cascade=CASCADE)
X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(8, 3)
KERNELS = np.random.default_rng(5).normal(size=(4, 3, 4)).astype(np.float32) * 2
MEMBERS = [[kernel, np.zeros(4, np.float32)] for kernel in KERNELS]


def net(activation=None):
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, activation=activation)])


def predictions_of(kind="classes", x=X):
    logits = np.array([x.astype(np.float64) @ kernel for kernel in KERNELS])
    return Predictions(special.log_softmax(logits, -1) if kind == "classes" else special.log_expit(logits), kind=kind)


def close(found, wanted, atol=1e-6):
    np.testing.assert_allclose(ops.convert_to_numpy(found), wanted, atol=atol, rtol=1e-6)


class Counting(keras.layers.Layer):
    """Ends in two logits, and notes the kernel and the rows of each call."""

    def __init__(self):
        super().__init__()
        self.kernel, self.seen = self.add_weight((1, 2), "zeros"), []
        self.built = True

    def call(self, x):
        self.seen.append((float(ops.convert_to_numpy(self.kernel)[0, 0]), len(x)))
        return ops.matmul(x, self.kernel)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity", "callable"])
def test_log_probabilities_are_the_logarithm_of_the_mean(activation):
    logits = np.array([X.astype(np.float64) @ kernel for kernel in KERNELS])
    logs = special.log_expit(logits) if activation == "sigmoid" else special.log_softmax(logits, -1)
    wanted = special.logsumexp(logs, axis=0) - np.log(4)
    given = ops.softmax if activation == "callable" else activation
    ensemble = SnapshotEnsemble(MEMBERS, net("softmax" if activation == "identity" else None), activation=given)
    close(ensemble(X, log=True), wanted)
    close(ensemble(X), np.exp(wanted))


def test_what_underflows_as_a_probability_is_exact_as_a_logarithm():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2, use_bias=False)])
    ensemble = SnapshotEnsemble([[np.array([[0.0, -2000.0]])]] * 2, model)
    assert ops.convert_to_numpy(ensemble(np.ones((1, 1)), log=True)).tolist() == [[0.0, -2000.0]]


@pytest.mark.parametrize(("activation", "temperature"), [("softmax", 1.0), ("softmax", 2.5), ("sigmoid", 2.5)])
def test_a_recipe_from_disk_gives_what_it_gives_of_predictions(tmp_path, activation, temperature):
    with SnapshotStore(tmp_path / "run", "w") as store:
        for index, (kernel, bias) in enumerate(MEMBERS, 1):
            tensors = {"000": kernel, "001": bias}
            store.save(tensors, index=index, step=index, cycle=index - 1, lr=0.1, framework="keras")
        names = tuple(member.sha256 for member in store.members)
    store.file(2).unlink()  # it has no weight, and is not read
    recipe = Recipe(tuple(WEIGHTS), temperature=temperature, members=names)
    recipe.save(tmp_path / "recipe.json")
    wanted = recipe.apply(predictions_of("classes" if activation == "softmax" else "labels"))
    options = {"activation": activation, "recipe": tmp_path / "recipe.json"}
    ensemble = SnapshotEnsemble.load(tmp_path / "run", net(), **options)
    assert (len(ensemble), ensemble.recipe.weights) == (3, (0.5, 0.2, 0.3))
    close(ensemble(X, log=True), wanted)
    close(ensemble(X), np.exp(wanted))
    with pytest.raises(DataError, match="last and members must be left out where there is a recipe"):
        SnapshotEnsemble.load(tmp_path / "run", net(), last=2, recipe=recipe)


def test_what_is_compiled_saved_and_built_on_has_the_recipe(tmp_path):
    ensemble, wanted = SnapshotEnsemble(MEMBERS, net(), recipe=RECIPE), RECIPE.apply(predictions_of())
    close(ensemble.predict(X, batch_size=3), np.exp(wanted))
    close(ensemble.predict(X, batch_size=3, log=True), wanted)
    close(ensemble.predict([(X[:5], None), (X[5:], None)], log=True), wanted)
    for name, log in (("plain", False), ("log", True)):
        ensemble.functional(log=log).save(tmp_path / f"{name}.keras")
        close(keras.models.load_model(tmp_path / f"{name}.keras")(X), wanted if log else np.exp(wanted))
    inputs = keras.Input((3,))
    close(keras.Model(inputs, ensemble(inputs, log=True))(X), wanted)


def test_without_a_recipe_nothing_changes_bit_for_bit():
    ensemble = SnapshotEnsemble(MEMBERS, net())
    first, *others = [ops.softmax(ops.convert_to_tensor(X @ kernel)) for kernel in KERNELS]
    for each in others:
        first = first + each
    np.testing.assert_allclose(ops.convert_to_numpy(ensemble(X)), ops.convert_to_numpy(first / 4), rtol=3e-7)
    layer = ensemble.functional().layers[-1]
    assert layer.get_config()["recipe"] is None


def test_members_one_by_one_are_their_own_whatever_the_recipe():
    ensemble, wanted = SnapshotEnsemble(MEMBERS, net(), recipe=RECIPE), predictions_of()
    close(ensemble.members(X), np.exp(wanted[:]))
    for member, expected in zip(ensemble, wanted, strict=True):
        assert member.recipe is None
        close(member(X, log=True), expected, atol=1e-5)


def test_pickles_and_tuning_keep_the_recipe():
    ensemble, wanted = SnapshotEnsemble(MEMBERS, net(), recipe=RECIPE), RECIPE.apply(predictions_of())
    again = pickle.loads(pickle.dumps(ensemble))
    assert again.recipe == RECIPE
    close(again(X, log=True), wanted)
    ensemble.tune(X, rounds=1)
    close(ensemble(X, log=True), wanted)


def test_a_cascade_gives_what_it_gives_of_predictions():
    wanted, members_used = run_cascade(predictions_of(), RECIPE)
    ensemble = SnapshotEnsemble(MEMBERS, net(), recipe=RECIPE)
    for x in (X, ops.convert_to_tensor(X)):
        found, used = ensemble.cascade(x, log=True, return_used=True)
        close(found, wanted)
        np.testing.assert_array_equal(used, members_used)
    assert ops.is_tensor(found)
    close(ensemble.cascade(X), np.exp(wanted))


def test_an_example_that_needs_one_member_never_reaches_the_second():
    layer = Counting()
    recipe = Recipe((1, 1), cascade=Cascade("probability", 0.9, (1.0, 1.0)))
    ensemble = SnapshotEnsemble([[np.array([[1.0, 0.0]])], [np.array([[9.0, 0.0]])]], layer, recipe=recipe)
    used = ensemble.cascade(np.ones((8, 1), np.float32), return_used=True)[1]
    assert (layer.seen, used.tolist()) == ([(9.0, 8)], [1] * 8)
    layer.seen.clear()
    used = ensemble.cascade(np.array([[1.0]] * 7 + [[0.01]], np.float32), return_used=True)[1]
    assert (layer.seen, used.tolist()) == ([(9.0, 8), (1.0, 1)], [1] * 7 + [2])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "needs a recipe that has one"),
        ({"recipe": Recipe((1, 1, 1, 1))}, "needs a recipe that has one"),
        ({"recipe": Recipe((1, 1, 1, 0), cascade=CASCADE), "activation": "sigmoid"}, "needs activation='softmax'"),
        ({"recipe": Recipe((1, 1, 1, 0), cascade=CASCADE), "activation": "identity"}, "the outputs are others"),
    ],
)
def test_a_cascade_that_cannot_be_is_refused(options, told):
    with pytest.raises(DataError, match=told):
        SnapshotEnsemble(MEMBERS, net(), **options).cascade(X)


def test_a_temperature_of_classes_is_refused_where_the_model_ends_in_sigmoid():
    with pytest.raises(DataError, match="build the model without that last activation, and pass activation='sigmoid'"):
        SnapshotEnsemble(MEMBERS, net("sigmoid"), recipe=RECIPE)
    SnapshotEnsemble(MEMBERS, net("sigmoid"), recipe=Recipe(tuple(WEIGHTS)))(X)


def test_a_cascade_of_probabilities_or_amid_a_model_is_refused():
    ensemble = SnapshotEnsemble(MEMBERS, net("softmax"), activation="softmax", recipe=RECIPE)
    with pytest.raises(DataError, match="already are probabilities"):
        ensemble.cascade(X)
    with pytest.raises(DataError, match="in a graph or trace there are none: call it outside"):
        SnapshotEnsemble(MEMBERS, net(), recipe=RECIPE).cascade(keras.Input((3,)))
    found = SnapshotEnsemble(MEMBERS, net("softmax"), recipe=RECIPE).cascade(X)
    close(found, np.exp(run_cascade(predictions_of(), RECIPE)[0]))
    with pytest.raises(DataError, match="the recipe is for 4 members, got 2"):
        SnapshotEnsemble(MEMBERS[:2], net(), recipe=RECIPE)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_it_holds_on_other_backends_by_every_strategy(backend):
    begun = process([Path(__file__).with_name("recipe_on_a_backend.py")], backend)
    printed, error = begun.communicate()
    assert (begun.returncode, printed.split()) == (0, ["loop", "stacked"]), error
