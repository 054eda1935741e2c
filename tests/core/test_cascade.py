"""A cascade, against every threshold tried one by one, and against running it example by example."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtr

from snapcore.ensemble import (
    RULES,
    Cascade,
    Fitted,
    Predictions,
    Recipe,
    cascade_batch,
    combine,
    fit_cascade,
    fit_temperature,
    run_cascade,
)
from snapcore.errors import DataError

from .predicting import some_logs, some_predictions


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def one_by_one(predictions, recipe):
    """What each example is told and what it costs, in plain words: ask, pool, look, stop or ask on."""
    rule, answers, used = recipe.cascade, [], []
    order = [i for i in range(len(predictions) - 1, -1, -1) if recipe.weights[i] > 0]
    for example in range(predictions.examples):
        asked = []
        for stage, member in enumerate(order):
            asked.append(member)
            p = [np.exp(predictions[i][example].astype(np.float64)) for i in asked]
            w = np.array([recipe.weights[i] for i in asked])
            with np.errstate(divide="ignore"):
                pooled = softmax(np.log(w @ p / w.sum()) / rule.temperatures[stage])
            second, first = np.argsort(pooled, kind="stable")[-2:]
            if rule.rule == "probability":
                sure = pooled[first]
            elif rule.rule == "margin":
                sure = pooled[first] - pooled[second]
            else:
                lead = np.array([each[first] - each[second] for each in p])
                sure = 0.0
                if len(lead) > 1 and lead.mean() > 0:
                    sure = 2 * stdtr(len(lead) - 1, lead.mean() / (lead.std(ddof=1) / len(lead) ** 0.5)) - 1
            if sure >= rule.threshold or stage == len(order) - 1:
                answers.append(np.log(pooled))
                used.append(stage + 1)
                break
    return np.array(answers), np.array(used)


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32 - 1), threshold=st.floats(0.05, 0.999), n_members=st.integers(2, 5))
@settings(max_examples=15)
def test_a_cascade_is_what_asking_one_after_the_other_gives(rule, seed, threshold, n_members):
    rng = np.random.default_rng(seed)
    made = some_predictions(n_members, 20, seed=seed)
    weights = rng.random(n_members) * (rng.random(n_members) < 0.8)
    weights[0] = 0.3
    stages = np.count_nonzero(weights)
    recipe = Recipe(tuple(weights), cascade=Cascade(rule, threshold, tuple(rng.uniform(0.5, 3, stages))))
    logs, used = run_cascade(made, recipe)
    expected, cost = one_by_one(made, recipe)
    assert (logs.dtype, used.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(used, cost)
    np.testing.assert_allclose(logs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@given(
    seed=st.integers(0, 2**32 - 1),
    tolerance=st.sampled_from([0.0, 2.0, 5.0, 100.0]),
    n_members=st.integers(1, 4),
    coarse=st.booleans(),
    expected=st.booleans(),
)
@settings(max_examples=30)
def test_no_threshold_of_all_is_cheaper_within_the_tolerance(rule, seed, tolerance, n_members, coarse, expected):
    logs, labels = some_logs(n_members, 20, seed=seed)
    if coarse:  # many equal scores
        p = np.round(np.exp(logs) * 4 + 0.25) + 0.25
        logs = np.log(p / p.sum(axis=-1, keepdims=True))
    made = Predictions(logs, labels)
    found = fit_cascade(made, tolerance=tolerance, rule=rule, expected=expected)
    whole = Recipe(found.weights, found.cascade.temperatures[-1]).apply(made).astype(np.float64)

    def cost_of(answers):
        """Counted on the labels, or expected by all members."""
        if not expected:
            return 100 * (np.mean(answers != labels) - np.mean(whole.argmax(axis=1) != labels))
        return 100 * np.mean(np.exp(whole.max(axis=1)) - np.exp(whole[np.arange(len(labels)), answers]))

    def at(threshold):
        tried = found.with_cascade(Cascade(rule, threshold, found.cascade.temperatures))
        told, used = run_cascade(made, tried)
        return cost_of(told.argmax(axis=1)), used.mean()

    error, cost = at(found.cascade.threshold)
    assert error <= tolerance + 1e-4
    for threshold in np.unique([*np.linspace(0, 1, 11), *scores_of(made, found)]):
        other, price = at(threshold)
        assert other > tolerance - 1e-4 or price >= cost - 1e-12


def scores_of(made, recipe):
    """Every score at which something changes, found by asking at thresholds that all examples reach or none does."""
    found = []
    for stage in range(len(made)):
        members = made[:][len(made) - 1 - stage :]
        p = np.exp(members.astype(np.float64))
        pooled = np.array([softmax(np.log(row) / recipe.cascade.temperatures[stage]) for row in p.mean(axis=0)])
        ordered = np.sort(pooled, axis=1)
        score = ordered[:, -1] if recipe.cascade.rule == "probability" else ordered[:, -1] - ordered[:, -2]
        found += [*score, *np.nextafter(score, 2)]
    return np.clip(found, 0, 1)


def test_what_labels_side_with_by_chance_does_not_count():
    """Of ten examples the newest member answers one otherwise than both, and is right: all the same it may be asked."""
    sure, torn = [0.9, 0.1], [0.45, 0.55]
    newest, oldest = np.log([sure] * 9 + [torn]), np.log([sure] * 9 + [[0.8, 0.2]])
    made = Predictions([oldest, newest], [0] * 8 + [1] * 2)
    _, used = run_cascade(made, fit_cascade(made, tolerance=0.0, expected=True))
    assert used.tolist() == [1] * 9 + [2]
    for options in ({"tolerance": 10.0, "expected": True}, {"tolerance": 0.0}):
        _, used = run_cascade(made, fit_cascade(made, **options))
        assert used.tolist() == [1] * 10


def test_each_stage_has_the_temperature_of_its_own_members():
    made = some_predictions(3, 400, scale=4.0)
    found = fit_cascade(made, tolerance=1.0).cascade.temperatures
    for stage, temperature in enumerate(found):
        last = Predictions(made[2 - stage :], made.labels)
        assert temperature == pytest.approx(fit_temperature(last).temperature, rel=1e-5)
    assert found[0] > 1 > found[2]  # one member is over-confident, and the mean of three is not


def test_a_stage_whose_temperature_runs_off_is_left_as_it_is():
    logs, labels = some_logs(2, 20)
    right = np.log(np.full((20, 3), 0.1) + 0.7 * np.eye(3)[labels])
    recipe = fit_cascade(Predictions([logs[0], right], labels), tolerance=0.0)
    assert recipe.cascade.temperatures[0] == 1.0
    assert recipe.cascade.threshold == 0.0  # the newest member alone makes no error


def test_no_threshold_is_above_a_score_of_1():
    """The newest member is sure of everything and mostly wrong, which no threshold can hear."""
    sure = np.where(np.eye(2)[[1] * 9 + [0]] > 0, 0.0, -np.inf)
    knows = np.log([[0.9, 0.1]] * 10)
    recipe = fit_cascade(Predictions([knows, sure], [0] * 10), tolerance=0.0, recipe=Recipe((9, 1)))
    assert recipe.cascade.threshold == 1.0


def test_members_without_a_weight_are_never_asked():
    made = some_predictions(4)
    recipe = Recipe((1, 0, 2, 0))
    cascaded = fit_cascade(made, tolerance=0.0, recipe=recipe)
    assert (cascaded.weights, len(cascaded.cascade.temperatures)) == (recipe.weights, 2)
    asked = []

    def ask(index, rows):
        asked.append(index)
        return made[index][rows]

    never = cascaded.with_cascade(Cascade("interval", 1.0, (1.0, 1.0)))
    logs, used = cascade_batch(ask, made.examples, never)
    assert asked == [2, 0]
    assert used.tolist() == [2] * 30
    np.testing.assert_allclose(logs, combine(made, weights=[1, 0, 2, 0]), rtol=1e-5)


def test_what_is_ignored_has_no_say():
    logs, labels = some_logs(3, 60)
    hidden = np.arange(60) % 3 == 0
    some = fit_cascade(Predictions(logs, np.where(hidden, -100, labels), ignore=-100), tolerance=2.0)
    assert some.cascade == fit_cascade(Predictions(logs[:, ~hidden], labels[~hidden]), tolerance=2.0).cascade
    assert some.fitted.rows == 40


def test_a_recipe_says_on_what_its_cascade_was_fitted():
    made = some_predictions(split="held-out", members=list("abcd"))
    found = fit_cascade(made, tolerance=1.0)
    assert (found.fitted, found.members) == (Fitted(30, "held-out", 0.0), tuple("abcd"))
    tempered = fit_temperature(made)
    assert fit_cascade(made, tolerance=1.0, recipe=tempered).fitted == tempered.fitted


@pytest.mark.parametrize("examples", [0, 1, 5, 16, 33])
def test_a_compiler_sees_five_shapes_at_most(examples):
    made = some_predictions(5, max(examples, 1))
    recipe = Recipe((1,) * 5, cascade=Cascade("margin", 0.6, (1.0,) * 5))
    sizes = set()

    def ask(index, rows):
        sizes.add(len(rows))
        return made[index][rows]

    found = cascade_batch(ask, examples, recipe, bucketed=True)
    assert sizes <= {-(-examples // divisor) for divisor in (1, 2, 4, 8, 16)}
    for one, other in zip(found, cascade_batch(ask, examples, recipe), strict=True):
        np.testing.assert_array_equal(one, other)
        assert len(one) == examples


def test_the_interval_needs_two_members_and_is_students():
    leads = np.log([[0.7, 0.3]]), np.log([[0.6, 0.4]]), np.log([[0.55, 0.45]])
    made = Predictions(leads)
    lead = np.array([0.1, 0.2])
    expected = 2 * stdtr(1, lead.mean() / (lead.std(ddof=1) / 2**0.5)) - 1
    for threshold, stages in ((0.0, 1), (1e-9, 2), (expected - 1e-6, 2), (expected + 1e-6, 3)):
        recipe = Recipe((1, 1, 1), cascade=Cascade("interval", threshold, (1.0,) * 3))
        assert run_cascade(made, recipe)[1].tolist() == [stages]


def test_a_class_alone_is_certain():
    made = Predictions(np.zeros((2, 3, 1)), [0, 0, 0])
    assert run_cascade(made, Recipe((1, 1), cascade=Cascade("margin", 1.0, (1.0, 1.0))))[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (some_predictions(), {"tolerance": -0.1}, "tolerance must be at least 0 percentage points, got -0.1"),
        (some_predictions(), {"tolerance": float("nan")}, "tolerance must be at least 0"),
        (some_predictions(), {"rule": "best"}, "rule must be one of probability, margin, interval, got 'best'"),
        (some_predictions(), {"recipe": Recipe((1, 1))}, "the recipe is for 2 members, got predictions of 4"),
        (Predictions(some_logs()[0]), {}, "labels are missing"),
        (
            Predictions([[1.0]], [1.0], kind="values"),
            {},
            r"is for classes, .*, got kind 'values', shape \(1, 1\)",
        ),
        (Predictions(np.zeros((1, 2, 3, 1))), {}, r"got kind 'classes', shape \(1, 2, 3, 1\)"),
    ],
)
def test_what_has_no_cascade_is_refused(made, options, message):
    with pytest.raises(DataError, match=message):
        fit_cascade(made, **{"tolerance": 1.0, **options})


def test_a_recipe_without_a_cascade_is_not_run():
    with pytest.raises(DataError, match="the recipe has no cascade: make one with fit_cascade"):
        run_cascade(some_predictions(2), Recipe((1, 1)))
