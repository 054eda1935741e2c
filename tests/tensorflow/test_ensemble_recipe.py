"""Log-probabilities, recipes and cascades, compiled: against the core's own of kept predictions, in float64."""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy import special

from snapcore import DataError
from snapcore.ensemble import Cascade, Predictions, Recipe, run_cascade
from snapcore.store import SnapshotStore
from snapcore_tensorflow import SnapshotEnsemble

STRATEGIES = ("loop", "xla")
WEIGHTS = np.array([0.5, 0.0, 0.2, 0.3])
RECIPE = Recipe(tuple(WEIGHTS), temperature=2.5, cascade=Cascade("probability", 0.7, (1.3, 1.2, 1.0)))
X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(8, 3)
KERNELS = np.random.default_rng(5).normal(size=(4, 3, 4)).astype(np.float32) * 2
MEMBERS = [[kernel] for kernel in KERNELS]


class Counting(layers.Layer):
    """A dense layer that notes how often it is traced, and the kernel and the rows of each run."""

    def __init__(self):
        super().__init__()
        self.kernel = self.add_weight((3, 4), "zeros")
        self.shapes, self.seen = [], []
        self.built = True

    def call(self, x):
        self.shapes.append(tuple(x.shape))
        kernel = tf.convert_to_tensor(self.kernel)
        tf.py_function(lambda kernel: self.seen.append((float(kernel[0, 0]), x.shape[0])), [kernel], [])
        return tf.matmul(x, kernel)


def net(activation=None):
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, use_bias=False, activation=activation)])


def predictions_of(kind="classes", x=X):
    logits = np.array([x.astype(np.float64) @ kernel for kernel in KERNELS])
    return Predictions(special.log_softmax(logits, -1) if kind == "classes" else special.log_expit(logits), kind=kind)


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_log_probabilities_are_the_logarithm_of_the_mean_and_exact_where_it_underflows(strategy):
    ensemble = SnapshotEnsemble(MEMBERS, net(), strategy=strategy)
    wanted = special.logsumexp(predictions_of()[:], axis=0) - np.log(4)
    close(ensemble(X, log=True), wanted)
    close(tf.function(lambda x: ensemble(x, log=True))(X), wanted)
    close(ensemble(X), np.exp(wanted))
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2, use_bias=False)])
    far = SnapshotEnsemble([[np.array([[0.0, -2000.0]])]] * 2, model, strategy=strategy)
    assert far(np.ones((1, 1), np.float32), log=True).numpy().tolist() == [[0.0, -2000.0]]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_recipe_from_disk_gives_what_it_gives_of_predictions(tmp_path, strategy, activation):
    with SnapshotStore(tmp_path / "run", "w") as store:
        for index, kernel in enumerate(KERNELS, 1):
            store.save({"000": kernel}, index=index, step=index, cycle=index - 1, lr=0.1, framework="tensorflow")
        names = tuple(member.sha256 for member in store.members)
    store.file(2).unlink()  # it has no weight, and is not read
    recipe = Recipe(tuple(WEIGHTS), temperature=2.5, members=names)
    recipe.save(tmp_path / "recipe.json")
    wanted = recipe.apply(predictions_of("classes" if activation == "softmax" else "labels"))
    options = {"activation": activation, "strategy": strategy, "recipe": tmp_path / "recipe.json"}
    ensemble = SnapshotEnsemble.load(tmp_path / "run", net(), **options)
    assert (len(ensemble), ensemble.recipe.weights) == (3, (0.5, 0.2, 0.3))
    close(ensemble(X, log=True), wanted)
    close(ensemble(X), np.exp(wanted))
    with pytest.raises(DataError, match="last and members must be left out where there is a recipe"):
        SnapshotEnsemble.load(tmp_path / "run", net(), last=2, recipe=recipe)


def test_predict_pickles_tuning_and_members_one_by_one():
    ensemble, wanted = SnapshotEnsemble(MEMBERS, net(), recipe=RECIPE), RECIPE.apply(predictions_of())
    close(ensemble.predict(tf.data.Dataset.from_tensor_slices(X).batch(5), log=True), wanted)
    close(pickle.loads(pickle.dumps(ensemble))(X, log=True), wanted)
    close(ensemble.members(X), np.exp(predictions_of()[:]))
    close(next(iter(ensemble))(X), np.exp(predictions_of()[0]))
    report = ensemble.tune(X, rounds=1)
    assert report["xla"].deviation <= 1e-6
    close(ensemble(X, log=True), wanted)


@pytest.mark.parametrize("examples", [8, 100])
def test_a_cascade_gives_what_it_gives_of_predictions_in_five_shapes_at_most(examples):
    x = np.random.default_rng(1).normal(size=(examples, 3)).astype(np.float32)
    wanted, members_used = run_cascade(predictions_of(x=x), RECIPE)
    layer = Counting()
    ensemble = SnapshotEnsemble(MEMBERS, layer, activation="softmax", recipe=RECIPE)
    for _ in range(3):
        found, used = ensemble.cascade(x, log=True, return_used=True)
        close(found, wanted)
        np.testing.assert_array_equal(used, members_used)
    assert tf.is_tensor(found)
    assert len(layer.shapes) == len({*layer.shapes}) <= 5  # one graph for each, whichever the member
    close(ensemble.cascade(tf.constant(x)), np.exp(wanted))


def test_an_example_that_needs_one_member_never_reaches_the_second():
    layer = Counting()
    members = [[np.full((3, 4), 5.0)], [np.diag([9.0, 9.0, 9.0, 9.0])[:3]]]
    recipe = Recipe((1, 1), cascade=Cascade("probability", 0.9, (1.0, 1.0)))
    ensemble = SnapshotEnsemble(members, layer, recipe=recipe)
    used = ensemble.cascade(np.eye(3, dtype=np.float32), return_used=True)[1]
    assert (layer.seen, used.tolist()) == ([(9.0, 3)], [1, 1, 1])


def test_a_cascade_that_cannot_be_is_refused():
    with pytest.raises(DataError, match="needs a recipe that has one"):
        SnapshotEnsemble(MEMBERS, net()).cascade(X)
    with pytest.raises(DataError, match="needs activation='softmax', got 'sigmoid'"):
        SnapshotEnsemble(MEMBERS, net(), activation="sigmoid", recipe=RECIPE).cascade(X)
    with pytest.raises(DataError, match="already are probabilities"):
        SnapshotEnsemble(MEMBERS, net("softmax"), recipe=RECIPE).cascade(X)
    with pytest.raises(DataError, match="the recipe is for 4 members, got 2"):
        SnapshotEnsemble(MEMBERS[:2], net(), recipe=RECIPE)
