"""Ensembles of every kind, of examples, pixels and tokens: against NumPy, and the core's recipes of predictions."""

import jax
import numpy as np
import pytest

from snapcore import DataError
from snapcore_jax import SnapshotEnsemble

from ..kinds import KINDS, members_of, pooled_of, recipe_of

STRATEGIES = ("loop", "stacked", "map")
SHAPES = [(8, 3), (2, 3, 5, 3)]


def params(outputs=4):
    random = np.random.default_rng(5)
    return [{"w": random.normal(size=(3, outputs)).astype(np.float32)} for _ in range(4)]


def apply_fn(params, x):
    return x @ params["w"]


def inputs(shape):
    return np.linspace(-2, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def outputs_of(members, x):
    return np.array([x.astype(np.float64) @ member["w"] for member in members])


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", KINDS)
def test_members_of_every_kind_are_pooled_with_and_without_a_recipe(activation, shape, strategy):
    """Classes, labels or values are on the last axis of dense outputs and of tokens."""
    members, x, recipe = params(), inputs(shape), recipe_of(activation)
    outputs = outputs_of(members, x)
    options = {"activation": activation, "strategy": strategy}
    ensemble = SnapshotEnsemble(members, apply_fn, **options)
    close(ensemble(x), pooled_of(activation, outputs))
    close(ensemble.members(x), members_of(activation, outputs))
    close(SnapshotEnsemble(members, apply_fn, recipe=recipe, **options)(x), pooled_of(activation, outputs, recipe))


def test_a_mean_and_a_variance_of_one_value_come_without_an_axis_of_values():
    members, x = params(2), inputs((8, 3))
    ensemble = SnapshotEnsemble(members, apply_fn, activation="gaussian")
    assert ensemble.members(x).shape == (4, 8, 2)
    close(ensemble(x), pooled_of("gaussian", outputs_of(members, x)))
    close(jax.jit(ensemble)(x), pooled_of("gaussian", outputs_of(members, x)))
    assert [each(x).shape for each in ensemble] == [(8, 2)] * 4


def test_means_and_variances_have_no_logarithm_and_come_in_pairs():
    with pytest.raises(DataError, match="log=True is for probabilities, and activation='gaussian' gives means"):
        SnapshotEnsemble(params(), apply_fn, activation="gaussian")(inputs((8, 3)), log=True)
    with pytest.raises(DataError, match=r"'gaussian' needs outputs .*, got shape \(8, 3\)"):
        SnapshotEnsemble(params(3), apply_fn, activation="gaussian")(inputs((8, 3)))
