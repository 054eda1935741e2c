"""Members become one prediction in any framework's operations: here NumPy's, against SciPy's formulas in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import special

from snapcore import DataError, StoreError
from snapcore.ensemble import (
    Cascade,
    Pooling,
    Predictions,
    Recipe,
    checked_recipe,
    member_files,
    recipe_files,
    run_cascade,
)
from snapcore.store import SnapshotStore

OPS = SimpleNamespace(
    softmax=special.softmax,
    log_softmax=special.log_softmax,
    sigmoid=special.expit,
    log_sigmoid=special.log_expit,
    exp=np.exp,
    log=np.log,
    expm1=np.expm1,
    where=np.where,
    maximum=np.maximum,
    minimum=np.minimum,
    mean=np.mean,
    stack=np.stack,
    stop_gradient=lambda values: values,
)
LOGITS = np.random.default_rng(0).normal(size=(3, 5, 4)) * 3
WEIGHTS = np.array([0.5, 0.2, 0.3])
CASCADE = Cascade("probability", 0.6, (1.2, 1.1, 1.0))


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(divide="ignore"):
        yield


def pooling(**options):
    return Pooling(OPS, **{"activation": "softmax", **options})


def pooled(pool, logits=LOGITS, *, log=False):
    members = (pool.activated(each, logs=pool.in_logs(log)) for each in logits)
    return pool.pooled(members, log=log)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("weights", [None, (0.5, 0.2, 0.3), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0)])
def test_the_mean_is_that_of_probabilities_weighted(weights, log):
    recipe = None if weights is None else Recipe(weights)
    expected = np.average(special.softmax(LOGITS, -1), axis=0, weights=weights)
    np.testing.assert_allclose(pooled(pooling(recipe=recipe), log=log), np.log(expected) if log else expected)


def test_one_array_of_members_gives_the_same_as_one_after_the_other():
    for recipe in (None, Recipe(tuple(WEIGHTS)), Recipe(tuple(WEIGHTS), temperature=2.0)):
        for log in (False, True):
            pool = pooling(recipe=recipe)
            stack = np.array([pool.activated(each, logs=pool.in_logs(log)) for each in LOGITS])
            np.testing.assert_allclose(pool.pooled_stack(stack, log=log), pooled(pool, log=log), rtol=1e-12)


def test_what_underflows_as_a_probability_is_exact_in_log_space():
    far = np.array([[[0.0, -2000.0]], [[0.0, -2000.0]]])
    np.testing.assert_array_equal(pooled(pooling(), far, log=True), [[0.0, -2000.0]])
    apart = np.array([[[0.0, -2000.0]], [[0.0, -1000.0]]])
    np.testing.assert_allclose(pooled(pooling(), apart, log=True)[0, 1], -1000 - np.log(2))


def test_what_no_member_thinks_possible_is_minus_infinity_and_nan_stays_nan():
    impossible = np.array([[[1.0, -np.inf, 0.0]], [[2.0, -np.inf, 0.0]], [[2.0, -np.inf, np.nan]]])
    pool = pooling(activation="identity")
    found = pool.pooled((special.log_softmax(each, -1) for each in impossible[:2]), log=True)
    assert found[0, 1] == -np.inf
    assert np.isfinite(found[0, [0, 2]]).all()
    assert np.isnan(pool.pooled(iter(impossible), log=True)[0, 2])


def test_a_gradient_goes_through_every_member():
    """By central differences: the largest term is taken out of the sum, and plays no part in the slope."""

    def slope(position):
        step = np.zeros_like(LOGITS)
        step[position, 0, 1] = 1e-6
        high, low = (pooled(pooling(), LOGITS + sign * step, log=True)[0, 1] for sign in (1, -1))
        return (high - low) / 2e-6

    p = special.softmax(LOGITS, -1)[:, 0, 1]
    np.testing.assert_allclose([slope(position) for position in range(3)], p * (1 - p) / p.sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["classes", "labels"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_recipe_is_applied_as_it_is_to_predictions(kind, temperature):
    recipe = Recipe(tuple(WEIGHTS), temperature=temperature)
    logs = special.log_softmax(LOGITS, -1) if kind == "classes" else special.log_expit(LOGITS)
    expected = recipe.apply(Predictions(logs, kind=kind))
    pool = pooling(activation="softmax" if kind == "classes" else "sigmoid", recipe=recipe)
    np.testing.assert_allclose(pooled(pool, log=True), expected, atol=1e-6)
    np.testing.assert_allclose(pooled(pool), np.exp(expected), atol=1e-6)


def test_identity_takes_a_temperature_for_one_of_classes():
    recipe = Recipe(tuple(WEIGHTS), temperature=2.0)
    found = pooled(pooling(activation="identity", recipe=recipe), special.softmax(LOGITS, -1))
    np.testing.assert_allclose(found, pooled(pooling(recipe=recipe)))


def test_a_callable_has_a_logarithm_and_no_temperature():
    pool = pooling(activation=lambda logits: special.softmax(logits, 0), recipe=Recipe(tuple(WEIGHTS)))
    expected = np.average(special.softmax(LOGITS, 1), axis=0, weights=WEIGHTS)
    np.testing.assert_allclose(pooled(pool), expected)
    np.testing.assert_allclose(pooled(pool, log=True), np.log(expected))
    with pytest.raises(DataError, match="with a temperature needs activation='softmax', 'sigmoid' or 'identity'"):
        pooling(activation=np.exp, recipe=Recipe((1.0,), temperature=2.0))


@pytest.mark.parametrize("values", [1, 3])
@pytest.mark.parametrize("weights", [None, (0.5, 0.2, 0.3), (0.0, 0.5, 0.5), (0.0, 1.0, 0.0)])
def test_gaussian_members_become_the_mean_and_variance_of_their_mixture(values, weights):
    """As of kept predictions; and the variance is E[y²] − E[y]²."""
    outputs = np.random.default_rng(1).normal(size=(3, 5, 2, 2 * values)) * 2
    recipe = None if weights is None else Recipe(weights)
    pool = pooling(activation="gaussian", recipe=recipe)
    members = np.array([pool.activated(each) for each in outputs])
    mean, variance = outputs[..., :values], np.exp(outputs[..., values:])
    if values == 1:
        mean, variance = mean[..., 0], variance[..., 0]
    np.testing.assert_allclose(members, np.stack([mean, variance], -1))
    found = pooled(pool, outputs)
    np.testing.assert_allclose(
        found, (recipe or Recipe((1, 1, 1))).apply(Predictions(members, kind="gaussian")), 1e-5, 1e-6
    )
    np.testing.assert_allclose(found[..., 0], np.average(mean, 0, weights))
    second = np.average(variance + mean**2, 0, weights)
    np.testing.assert_allclose(found[..., 1], second - np.average(mean, 0, weights) ** 2)
    np.testing.assert_allclose(pool.pooled_stack(members), found)


def test_the_variance_of_a_mixture_far_from_zero_is_not_lost_in_the_square_of_its_mean():
    outputs = np.array([[[1e4, -4.0]], [[1e4 + 0.5, -4.0]]], np.float32)
    expected = np.exp(-4) + 0.0625
    assert pooled(pooling(activation="gaussian"), outputs)[0, 1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(4, 3), ()])
def test_gaussian_outputs_that_are_no_pairs_are_refused(shape):
    with pytest.raises(DataError, match=r"'gaussian' needs outputs \[..., 2 · values\], means and then ln"):
        pooling(activation="gaussian").activated(np.zeros(shape))


def test_means_and_variances_have_no_logarithm_no_temperature_and_no_cascade():
    recipe = Recipe(tuple(WEIGHTS), cascade=CASCADE)
    pool = pooling(activation="gaussian", recipe=recipe)
    with pytest.raises(DataError, match="log=True is for probabilities, and activation='gaussian' gives means and var"):
        pooled(pool, log=True)
    with pytest.raises(DataError, match="a cascade needs activation='softmax', got 'gaussian'"):
        pool.cascade(lambda index, rows: LOGITS, [(5, 4)])
    with pytest.raises(DataError, match=r"a temperature needs activation='softmax', .* got 'gaussian': pass one of"):
        pooling(activation="gaussian", recipe=Recipe((1.0,), temperature=2.0))


def test_values_are_pooled_by_their_weights():
    found = pooled(pooling(activation="identity", recipe=Recipe(tuple(WEIGHTS))), LOGITS)
    np.testing.assert_allclose(found, Recipe(tuple(WEIGHTS)).apply(Predictions(LOGITS, kind="values")), rtol=1e-5)


def test_a_member_alone_has_no_recipe():
    pool = pooling(recipe=Recipe(tuple(WEIGHTS), temperature=3.0), axis=-1)
    assert pool.alone() == pooling(axis=-1)


def asked(pool, **options):
    """A cascade over the logits, and the rows that each member was asked for."""
    rows = {}

    def ask(index, positions):
        rows[index] = positions.tolist()
        return pool.activated(LOGITS[index][positions], logs=True)

    return *pool.cascade(ask, [(5, 4), (), (5,)], **options), rows


def test_a_cascade_gives_what_it_gives_of_kept_predictions():
    recipe = Recipe(tuple(WEIGHTS), cascade=CASCADE)
    expected, used = run_cascade(Predictions(special.log_softmax(LOGITS, -1)), recipe)
    for bucketed in (False, True):
        found, members, rows = asked(pooling(recipe=recipe), log=True, bucketed=bucketed)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_array_equal(members, used)
        assert rows[2] == [0, 1, 2, 3, 4]
        assert set(rows[1]) == {*np.flatnonzero(used > 1)}
    np.testing.assert_allclose(asked(pooling(recipe=recipe))[0], np.exp(expected), atol=1e-6)


def test_a_cascade_takes_a_model_that_ends_in_softmax_and_no_other_without_activation():
    recipe = Recipe(tuple(WEIGHTS), cascade=CASCADE)
    pool, probabilities = pooling(activation="identity", recipe=recipe), special.softmax(LOGITS, -1)
    found, used = pool.cascade(lambda index, rows: np.log(probabilities[index][rows]), [(5, 3)])
    expected, members, _ = asked(pooling(recipe=recipe))
    np.testing.assert_allclose(found, expected)
    np.testing.assert_array_equal(used, members)
    with pytest.raises(DataError, match="with activation='identity' the outputs are others: pass 'softmax'"):
        pool.cascade(lambda index, rows: -np.abs(LOGITS[index][rows]) - 5, [(5, 3)])


@pytest.mark.parametrize(
    ("options", "shapes", "told"),
    [
        ({}, [(5, 3)], "needs a recipe that has one: make it with fit_cascade"),
        ({"recipe": Recipe((1, 1, 1))}, [(5, 3)], "needs a recipe that has one: make it with fit_cascade"),
        ({"activation": "sigmoid"}, [(5, 3)], "needs activation='softmax', got 'sigmoid'"),
        ({"activation": np.exp}, [(5, 3)], "needs activation='softmax', got a callable"),
        ({"axis": 0}, [(5, 3)], r"needs outputs \[batch, classes\], got shape \(5, 4\) of 5 examples, and axis=0"),
        ({}, [(2, 3)], r"needs outputs \[batch, classes\], got shape \(5, 4\) of 2 examples"),
        ({}, [(5, 3), (4, 3)], r"their first axis must be the batch, got lengths \[4, 5\]"),
        ({}, [()], r"their first axis must be the batch, got lengths \[\]"),
    ],
)
def test_what_a_cascade_cannot_do_is_refused_in_one_line(options, shapes, told, request):
    first = "needs a recipe" in told
    pool = pooling(**({} if first else {"recipe": Recipe((1, 1, 1), cascade=CASCADE)}) | options)
    with pytest.raises(DataError, match=told) as caught:
        pool.cascade(lambda index, rows: special.log_softmax(LOGITS[index], -1), shapes)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_for_as_many_members_as_there_are(tmp_path):
    recipe = Recipe((1, 2))
    recipe.save(tmp_path / "recipe.json")
    assert checked_recipe(None, 3) is None
    assert checked_recipe(recipe, 2) is recipe
    assert checked_recipe(tmp_path / "recipe.json", 2) == recipe
    with pytest.raises(DataError, match=r"the recipe is for 2 members, got 3: SnapshotEnsemble.load\(…, recipe=…\)"):
        checked_recipe(recipe, 3)
    with pytest.raises(StoreError, match="does not exist"):
        checked_recipe(tmp_path / "none.json", 2)


def test_without_a_recipe_the_files_are_those_of_all_members(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        for index in (1, 2, 3):
            values = {"w": np.full(2, index, np.float32)}
            store.save(values, index=index, step=index, cycle=0, lr=0.1, framework="torch")
    for options in ({}, {"last": 2}, {"members": [1]}):
        expected = member_files(tmp_path, framework="torch", **options)
        assert recipe_files(tmp_path, None, framework="torch", **options) == (expected, None)
