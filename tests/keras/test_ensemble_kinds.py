"""Ensembles of every kind, of examples, pixels and tokens: against NumPy, and the core's recipes of predictions."""

import keras
import numpy as np
import pytest
from keras import layers

from snapcore import DataError
from snapcore_keras import SnapshotEnsemble
from snapcore_keras.losses import GaussianNll

from ..kinds import KINDS, members_of, pooled_of, recipe_of

SHAPES = [(8, 3), (2, 3, 5, 3)]


def kernels(outputs=4):
    return [[kernel] for kernel in np.random.default_rng(5).normal(size=(4, 3, outputs)).astype(np.float32)]


def net(shape, outputs=4):
    return keras.Sequential([keras.Input(shape[1:]), layers.Dense(outputs, use_bias=False)])


def inputs(shape):
    return np.linspace(-2, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def outputs_of(members, x):
    return np.array([x.astype(np.float64) @ kernel for (kernel,) in members])


def close(found, wanted):
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", KINDS)
def test_members_of_every_kind_are_pooled_with_and_without_a_recipe(activation, shape):
    """Classes, labels or values are on the last axis of dense outputs and of tokens."""
    members, x, recipe = kernels(), inputs(shape), recipe_of(activation)
    outputs = outputs_of(members, x)
    ensemble = SnapshotEnsemble(members, net(shape), activation=activation)
    close(ensemble(x), pooled_of(activation, outputs))
    close(ensemble.members(x), members_of(activation, outputs))
    weighted = SnapshotEnsemble(members, net(shape), activation=activation, recipe=recipe)
    close(weighted(x), pooled_of(activation, outputs, recipe))
    close(weighted.predict(x), pooled_of(activation, outputs, recipe))


def test_a_mean_and_a_variance_of_one_value_come_without_an_axis_of_values(tmp_path):
    """Also from the model that is saved."""
    members, x = kernels(2), inputs((8, 3))
    ensemble = SnapshotEnsemble(members, net((8, 3), 2), activation="gaussian")
    assert tuple(ensemble.members(x).shape) == (4, 8, 2)
    expected = pooled_of("gaussian", outputs_of(members, x))
    close(ensemble(x), expected)
    assert [tuple(each(x).shape) for each in ensemble] == [(8, 2)] * 4
    ensemble.functional().save(tmp_path / "ensemble.keras")
    close(keras.saving.load_model(tmp_path / "ensemble.keras")(x), expected)


def test_means_and_variances_have_no_logarithm_and_come_in_pairs():
    ensemble = SnapshotEnsemble(kernels(), net((8, 3)), activation="gaussian")
    for call in (ensemble, ensemble.predict, lambda x, log: ensemble.functional(log=log)):
        with pytest.raises(DataError, match="log=True is for probabilities, and activation='gaussian' gives means"):
            call(inputs((8, 3)), log=True)
    with pytest.raises(DataError, match=r"'gaussian' needs outputs .*, got shape \(8, 3\)"):
        SnapshotEnsemble(kernels(3), net((8, 3), 3), activation="gaussian")(inputs((8, 3)))


def test_a_model_compiled_with_the_gaussian_loss_gives_means_and_variances():
    model = net((8, 3))
    model.compile("sgd", GaussianNll())
    x = inputs((8, 3))
    close(SnapshotEnsemble(kernels(), model)(x), pooled_of("gaussian", outputs_of(kernels(), x)))
