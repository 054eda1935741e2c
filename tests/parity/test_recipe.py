"""One recipe, saved once, serves the same members in every framework as it serves their kept predictions."""

import numpy as np
import pytest
from scipy import special

from snapcore.ensemble import Predictions, fit_cascade, fit_temperature, fit_weights, run_cascade
from snapcore.store import SnapshotStore

GENERATOR = np.random.default_rng(7)
KERNELS = GENERATOR.normal(size=(4, 3, 5)).astype(np.float32) * 2
BIASES = GENERATOR.normal(size=(4, 5)).astype(np.float32)
X = GENERATOR.normal(size=(64, 3)).astype(np.float32)
LOGITS = X.astype(np.float64) @ KERNELS + BIASES[:, None]


def of_torch(directory, recipe):
    import torch

    from snapcore_torch import SnapshotEnsemble

    ensemble = SnapshotEnsemble.load(directory, torch.nn.Linear(3, 5), recipe=recipe)
    return ensemble, torch.from_numpy(X), lambda found: found.numpy()


def of_jax(directory, recipe):
    from snapcore_jax import SnapshotEnsemble

    like = {"bias": BIASES[0], "weight": KERNELS[0]}
    ensemble = SnapshotEnsemble.load(directory, lambda p, x: x @ p["weight"] + p["bias"], like=like, recipe=recipe)
    return ensemble, X, np.asarray


def of_keras(directory, recipe):
    from keras import Input, Sequential, layers, ops

    from snapcore_keras import SnapshotEnsemble

    model = Sequential([Input((3,)), layers.Dense(5)])
    return SnapshotEnsemble.load(directory, model, recipe=recipe), X, ops.convert_to_numpy


def of_tensorflow(directory, recipe):
    from keras import Input, Sequential, layers

    from snapcore_tensorflow import SnapshotEnsemble

    model = Sequential([Input((3,)), layers.Dense(5)])
    return SnapshotEnsemble.load(directory, model, recipe=recipe), X, np.asarray


OWN = {
    "torch": (of_torch, lambda kernel, bias: {"weight": kernel.T.copy(), "bias": bias}),
    "jax": (of_jax, lambda kernel, bias: {"weight": kernel, "bias": bias}),
    "keras": (of_keras, lambda kernel, bias: {"000": kernel, "001": bias}),
    "tensorflow": (of_tensorflow, lambda kernel, bias: {"000": kernel, "001": bias}),
}


@pytest.fixture(scope="module")
def predictions():
    labels = special.softmax(LOGITS.mean(0) + np.random.default_rng(8).gumbel(size=(64, 5)), -1).argmax(-1)
    return Predictions(special.log_softmax(LOGITS, -1), labels)


@pytest.fixture(scope="module")
def recipe(predictions):
    fitted = fit_temperature(predictions, fit_weights(predictions))
    return fit_cascade(predictions, tolerance=0.5, recipe=fitted)


@pytest.mark.parametrize("framework", OWN)
def test_a_recipe_serves_the_same_in_every_framework(framework, predictions, recipe, tmp_path):
    load, layout = OWN[framework]
    with SnapshotStore(tmp_path / "run", "w") as store:
        for index, (kernel, bias) in enumerate(zip(KERNELS, BIASES, strict=True), 1):
            tensors = layout(kernel, bias)
            store.save(tensors, index=index, step=index, cycle=index - 1, lr=0.1, framework=framework)
    recipe.save(tmp_path / "recipe.json")
    ensemble, x, to_host = load(tmp_path / "run", tmp_path / "recipe.json")
    assert len(ensemble) == sum(weight > 0 for weight in recipe.weights)
    np.testing.assert_allclose(to_host(ensemble(x, log=True)), recipe.apply(predictions), atol=1e-6, rtol=1e-6)
    found, used = ensemble.cascade(x, log=True, return_used=True)
    wanted, members_used = run_cascade(predictions, recipe)
    np.testing.assert_allclose(to_host(found), wanted, atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(used, members_used)


def test_the_recipe_is_one_in_which_everything_plays_a_part(predictions, recipe):
    assert sum(weight > 0 for weight in recipe.weights) > 1
    assert abs(recipe.temperature - 1) > 0.01
    assert len({*run_cascade(predictions, recipe)[1]}) > 1
