"""Members chosen, weighted and calibrated, against the published algorithm, SciPy and scikit-learn."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from snapcore.ensemble import (
    FEW,
    Fitted,
    Predictions,
    Recipe,
    RunsOffError,
    fit_cascade,
    fit_temperature,
    fit_weights,
    score_predictions,
    select,
)
from snapcore.ensemble.simplex import minimise
from snapcore.errors import DataError

from .predicting import log_probabilities, some_logs, some_predictions


def of_rows(likelihoods):
    """Predictions of two classes whose labels have these likelihoods, [members, examples]."""
    p = np.asarray(likelihoods, np.float64)
    return Predictions.from_probabilities(np.stack([p, 1 - p], -1), np.zeros(p.shape[1], int))


def loss_of(predictions, weights):
    """The NLL of a weighted mean, in linear space and in float64."""
    p = np.exp(predictions[:].astype(np.float64))
    pooled = np.tensordot(np.asarray(weights) / np.sum(weights), p, 1)
    with np.errstate(divide="ignore"):
        return -np.log(pooled[np.arange(len(pooled)), predictions.labels]).mean()


# --- select


def published_selection(predictions, size):
    """Caruana et al. 2004, section 2: the bag's probabilities are summed up, and every candidate is scored anew."""
    p = np.exp(predictions[:].astype(np.float64))
    bag, total = [], np.zeros(p.shape[1:])
    history = []
    for count in range(1, size + 1):
        losses = []
        for member in p:
            mean = (total + member) / count
            losses.append(-np.log(mean[np.arange(len(mean)), predictions.labels]).mean())
        least = [i for i, loss in enumerate(losses) if loss <= min(losses) + 1e-13]
        chosen = next((i for i in least if i in bag), least[0])
        bag.append(chosen)
        total += p[chosen]
        history.append(losses[chosen])
    length = next(k for k, loss in enumerate(history) if loss <= min(history) + 1e-13) + 1
    return np.bincount(bag[:length], minlength=len(p)) / length


@given(st.integers(0, 2**32 - 1), st.integers(1, 25), st.integers(1, 8), st.sampled_from([0.3, 1.0, 4.0]))
@settings(max_examples=25)
def test_members_are_selected_as_published(seed, size, n_members, scale):
    made = some_predictions(n_members, 40, 4, scale=scale, seed=seed)
    np.testing.assert_allclose(select(made, size=size).weights, published_selection(made, size), atol=1e-12)


@given(log_probabilities(impossible=False, examples=(2, 12)))
@settings(max_examples=25)
def test_the_selection_loses_no_more_than_the_best_member_where_probabilities_underflow(data):
    made = Predictions(*data)
    found = score_predictions(made, weights=select(made).weights)["nll"]
    alone = [score_predictions(made, weights=row)["nll"] for row in np.eye(len(made))]
    assert found <= min(alone) * (1 + 1e-6) + 1e-9


def test_the_same_member_twice_counts_as_one():
    logs, labels = some_logs(3)
    found = select(Predictions(np.concatenate([logs, logs]), labels)).weights
    assert found[3:] == (0, 0, 0)
    assert found[:3] == pytest.approx(select(Predictions(logs, labels)).weights)


def test_labels_that_single_members_find_impossible_are_covered_by_several():
    """Each member loses two of three labels, so no single one has a finite loss, nor has a pair."""
    made = of_rows([[0.9, 0.0, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 0.7]])
    assert select(made).weights == pytest.approx([1 / 3] * 3, abs=0.1)
    assert np.isfinite(score_predictions(made, weights=select(made).weights)["nll"])
    lone = select(made, size=1)
    assert lone.weights == (1.0, 0.0, 0.0)
    assert lone.fitted.gain is None  # it is minus infinity


@pytest.mark.parametrize("fit", [select, fit_weights])
def test_a_label_that_every_member_finds_impossible_is_named(fit):
    with pytest.raises(DataError, match="the label of row 1 has probability 0 under every member: check the labels"):
        fit(of_rows([[0.9, 0.0], [0.1, 0.0]]))


@pytest.mark.parametrize("size", [0, -1])
def test_at_least_one_choice_is_made(size):
    with pytest.raises(DataError, match=f"size must be at least 1, got {size}"):
        select(some_predictions(), size=size)


def test_values_are_selected_by_their_squared_error():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=50)
    members = targets + rng.normal(size=(4, 50)) * np.array([[0.5], [0.6], [3.0], [0.7]]) + 0.2
    made = Predictions(members, targets, kind="values")
    residuals, bag, history = made[:].astype(np.float64) - targets, [], []
    for _ in range(25):
        losses = [np.mean(np.mean([residuals[i] for i in [*bag, each]], axis=0) ** 2) for each in range(4)]
        bag.append(int(np.argmin(losses)))
        history.append(min(losses))
    length = int(np.argmin(history)) + 1
    expected = np.bincount(bag[:length], minlength=4) / length
    np.testing.assert_allclose(select(made).weights, expected)


# --- weights


def slsqp(predictions, starts=20):
    """The least loss that SciPy finds from 20 starts."""
    p = np.exp(predictions[:].astype(np.float64))[:, np.arange(predictions.examples), predictions.labels]
    rng = np.random.default_rng(0)

    def loss(w):
        return -np.log(np.maximum(w @ p, 1e-300)).mean()

    def slope(w):
        return -(p / np.maximum(w @ p, 1e-300)).mean(axis=1)

    constraint = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
    found = [
        minimize(loss, rng.dirichlet(np.ones(len(p))), jac=slope, bounds=[(0, 1)] * len(p), constraints=[constraint])
        for _ in range(starts)
    ]
    return min(float(loss(each.x / each.x.sum())) for each in found)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from([0.3, 1.0, 6.0]))
@settings(max_examples=15)
def test_weights_are_within_a_ten_thousandth_of_those_of_scipy(seed, n_members, scale):
    made = some_predictions(n_members, 60, 4, scale=scale, seed=seed)
    found = fit_weights(made).weights
    assert sum(found) == pytest.approx(1)
    assert abs(loss_of(made, found) - slsqp(made)) < 1e-4


@given(log_probabilities(impossible=False, max_members=4))
@settings(max_examples=25)
def test_weights_are_optimal_by_their_own_conditions_where_probabilities_underflow(data):
    """Karush, Kuhn and Tucker: no member's mean ratio to the whole exceeds 1, and 1 it is for those with a weight."""
    made = Predictions(*data)
    weights = np.array(fit_weights(made).weights)
    with np.errstate(divide="ignore"):
        logs = made.log_likelihood()
        pooled = logsumexp(logs, axis=0, b=weights[:, None])
    ratios = np.exp(np.minimum(logs - pooled, 50)).mean(axis=1)
    assert ratios.max() < 1 + 1e-5
    assert (weights * np.abs(ratios - 1)).max() < 1e-5


def test_a_member_that_one_label_in_many_needs_keeps_its_weight():
    """Without it that label has probability 0, however small the weight is."""
    rows = np.full((2, 150_000), 0.9)
    rows[1, :], rows[:, 0] = 0.1, [0.0, 0.5]
    found = fit_weights(of_rows(rows)).weights
    assert found[1] > 0
    assert loss_of(of_rows(rows), found) < np.inf


def test_a_useless_member_gets_no_weight_at_all():
    assert fit_weights(of_rows([[0.9, 0.8], [0.5, 0.1]])).weights == (1.0, 0.0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_weights_of_values_are_those_of_least_squares_on_the_simplex(scale):
    rng = np.random.default_rng(1)
    targets = rng.normal(size=80) * scale
    members = targets + rng.normal(size=(4, 80)) * np.array([[0.5], [0.6], [3.0], [0.7]]) * scale
    made = Predictions(members, targets, kind="values")
    residuals = (made[:].astype(np.float64) - targets) / scale
    best = minimize(
        lambda w: ((w @ residuals) ** 2).mean(),
        np.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}],
        options={"ftol": 1e-12},
    )
    np.testing.assert_allclose(fit_weights(made).weights, best.x, atol=2e-3)


def test_perfect_members_may_have_any_weights():
    made = Predictions(np.zeros((3, 5)), np.zeros(5), kind="values")
    assert sum(fit_weights(made).weights) == pytest.approx(1)
    assert fit_weights(made).fitted.gain == 0.0


def test_gaussian_members_are_weighed_by_their_densities():
    rng = np.random.default_rng(2)
    targets = rng.normal(size=600)
    good = np.stack([np.zeros(600), np.ones(600)], -1)
    bad = np.stack([np.full(600, 9.0), np.full(600, 0.01)], -1)
    made = Predictions([bad, good], targets, kind="gaussian")
    for fit in (select, fit_weights):
        found = fit(made)
        assert found.weights == pytest.approx((0, 1), abs=1e-5)
        equal = score_predictions(made)["nll"]
        assert found.fitted.gain == pytest.approx(equal - score_predictions(made, weights=found.weights)["nll"])


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_the_bound_on_what_is_left_holds(size, seed):
    """On squared distances from a point the minimum is a projection onto the simplex, found by sorting."""
    point = np.random.default_rng(seed).normal(size=size)

    def distance(w):
        return float(((w - point) ** 2).sum()), 2 * (w - point), 2 * np.eye(size)

    falling = np.sort(point)[::-1]
    excess = (np.cumsum(falling) - 1) / np.arange(1, size + 1)
    projection = np.maximum(point - excess[np.flatnonzero(falling > excess)[-1]], 0)
    found, gap = minimise(distance, size, tolerance=1e-6)
    above = distance(found)[0] - distance(projection)[0]
    assert -1e-12 <= above <= gap + 1e-12
    assert gap <= 1e-5


def test_a_function_whose_slope_is_not_its_own_ends_too_and_is_not_called_optimal():
    """Its value rises wherever its slope says that it falls."""
    costs = np.array([1e3, 0.0])
    found, gap = minimise(lambda w: (-1e3 * float(costs @ w), costs, np.zeros((2, 2))), 2, tolerance=1e-6)
    assert found.sum() == pytest.approx(1)
    assert gap > 1


# --- temperature


class Known(ClassifierMixin, BaseEstimator):
    """A classifier whose outputs are its inputs."""

    def fit(self, x, y):
        self.classes_ = np.arange(x.shape[1])
        return self

    def decision_function(self, x):
        return x

    def predict(self, x):
        return x.argmax(axis=1)


def temperature_of_scikit_learn(logits, labels):
    model = FrozenEstimator(Known().fit(logits, labels))
    calibrated = CalibratedClassifierCV(model, method="temperature").fit(logits, labels)
    return 1 / calibrated.calibrated_classifiers_[0].calibrators[0].beta_


@given(st.integers(0, 2**32 - 1), st.integers(3, 5), st.sampled_from([0.2, 1.0, 3.0, 20.0]))
@settings(max_examples=12)
def test_the_temperature_is_that_of_scikit_learn(seed, classes, scale):
    made = some_predictions(1, 80, classes, scale=scale, seed=seed)
    assume(np.bincount(made.labels, minlength=classes).min() >= 5)  # scikit-learn looks at five folds
    logits = made[0].astype(np.float64)
    expected = temperature_of_scikit_learn(logits, made.labels)
    assert fit_temperature(made).temperature == pytest.approx(expected, rel=1e-3)


@given(log_probabilities(impossible=False, examples=(4, 12)))
@settings(max_examples=50)
def test_no_other_temperature_is_better_where_probabilities_underflow(data):
    made = Predictions(*data)
    try:
        temperature = fit_temperature(made).temperature
    except RunsOffError:
        assume(False)

    def loss(t):
        return score_predictions(made, temperature=t)["nll"]

    assert loss(temperature) <= min(loss(temperature * factor) for factor in (0.5, 0.99, 1.01, 2)) + 1e-9


def test_members_are_pooled_as_the_recipe_weighs_them_and_its_rest_is_kept():
    made = some_predictions(3, 600, scale=3.0)
    weighed = fit_weights(made)
    found = fit_temperature(made, weighed)
    assert found.weights == weighed.weights
    pooled = logsumexp(made[:].astype(np.float64), axis=0, b=np.reshape(weighed.weights, (3, 1, 1)))
    best = minimize_scalar(
        lambda t: -log_softmax(pooled / t, axis=-1)[np.arange(600), made.labels].mean(), bounds=(0.1, 10)
    )
    assert found.temperature == pytest.approx(best.x, rel=1e-4)
    cascaded = fit_cascade(made, tolerance=1.0)
    assert fit_temperature(made, cascaded).cascade == cascaded.cascade


def test_of_several_labels_all_decisions_share_one_temperature():
    rng = np.random.default_rng(0)
    logits = 4 * rng.normal(size=(2, 200, 3))
    labels = (rng.random((200, 3)) < 1 / (1 + np.exp(-logits.mean(axis=0) / 3))).astype(int)
    p = 1 / (1 + np.exp(-logits))
    made = Predictions.from_probabilities(p, labels, kind="labels")
    pooled = np.log(p.mean(axis=0)) - np.log(1 - p.mean(axis=0))
    best = minimize_scalar(
        lambda t: np.logaddexp(0, -np.where(labels == 1, pooled, -pooled) / t).mean(), bounds=(0.1, 20)
    )
    assert fit_temperature(made).temperature == pytest.approx(best.x, rel=1e-3)


def test_what_is_ignored_has_no_say():
    logs, labels = some_logs(2, 50, 4)
    tokens = Predictions(logs.reshape(2, 10, 5, 4), np.where(labels < 0, -1, labels).reshape(10, 5), ignore=-100)
    hidden = np.random.default_rng(0).random(50) < 0.3
    some = Predictions(logs, np.where(hidden, -100, labels), ignore=-100)
    rest = Predictions(logs[:, ~hidden], labels[~hidden])
    for fit in (fit_temperature, fit_weights, select):
        assert fit(some).weights == pytest.approx(fit(rest).weights, abs=1e-6)
        assert fit(some).temperature == pytest.approx(fit(rest).temperature)
        assert fit(some).fitted.rows == rest.rows < 50
        assert fit(tokens).weights == pytest.approx(fit(Predictions(logs, labels)).weights, abs=1e-6)


def test_a_temperature_that_runs_off_is_said():
    right = some_predictions(1, 50, scale=9.0)
    right = Predictions(right[:], right[0].argmax(axis=-1))
    with pytest.raises(RunsOffError, match="runs off to 0, since every held-out label is the most probable class"):
        fit_temperature(right)
    wrong = Predictions(right[:], right[0].argmin(axis=-1))
    with pytest.raises(RunsOffError, match="runs off to infinity, since the predictions say nothing about the labels"):
        fit_temperature(wrong)
    flat = Predictions(np.log(np.full((1, 8, 4), 0.25)), np.arange(8) % 4)
    with pytest.raises(RunsOffError, match="runs off to infinity"):
        fit_temperature(flat)
    nearly = log_softmax(np.array([[[1e-4, 0.0]] * 99 + [[0.0, 1e-6]]]), axis=-1)
    with pytest.raises(RunsOffError, match="runs off to 0, since the labels are nearly separated"):
        fit_temperature(Predictions(nearly, [0] * 100))
    impossible = Predictions.from_probabilities([[[0.5, 0.5], [1.0, 0.0]]], [0, 1])
    with pytest.raises(RunsOffError, match="the label of row 1 has probability 0, which no temperature mends"):
        fit_temperature(impossible)


@pytest.mark.parametrize("kind", ["values", "gaussian"])
def test_values_have_no_temperature_to_fit(kind):
    made = Predictions(np.ones((2, 5, 2)), kind=kind)
    with pytest.raises(DataError, match=f"a temperature is for probabilities, got predictions of kind '{kind}'"):
        fit_temperature(made)


def test_a_recipe_of_other_members_has_no_temperature_fitted():
    with pytest.raises(DataError, match="the recipe is for 2 members, got predictions of 4"):
        fit_temperature(some_predictions(), Recipe((1, 1)))


# --- what is said of it


@pytest.mark.parametrize("fit", [select, fit_weights, fit_temperature])
def test_the_gain_is_what_the_scores_differ_by(fit):
    made = some_predictions(4, FEW, scale=3.0, split="held-out", members=list("abcd"))
    found = fit(made)
    gain = (
        score_predictions(made)["nll"]
        - (score_predictions(made, weights=found.weights, temperature=found.temperature)["nll"])
    )
    assert found.fitted == Fitted(FEW, "held-out", pytest.approx(gain, abs=1e-6), "in-sample")
    assert found.members == ("a", "b", "c", "d")


def test_the_gain_of_a_temperature_has_that_of_the_weights_in_it_and_no_earlier_temperatures():
    made = some_predictions(4, FEW, scale=3.0)
    once = fit_temperature(made, fit_weights(made))
    twice = fit_temperature(made, fit_temperature(made, once))
    assert twice.fitted.gain == pytest.approx(once.fitted.gain)
    assert once.fitted.gain == pytest.approx(
        score_predictions(made)["nll"]
        - score_predictions(made, weights=once.weights, temperature=once.temperature)["nll"],
        abs=1e-6,
    )


def test_with_few_examples_the_gain_is_that_on_the_other_half():
    made = some_predictions(3, FEW - 1, scale=2.0)
    found = fit_temperature(made)
    assert found.fitted.how == "2-fold, 5 times"
    assert found.temperature == fit_temperature(made).temperature  # fitted on all of them
    rng, gains, rows = np.random.default_rng(0), [], []
    for _ in range(5):
        order = rng.permutation(FEW - 1)
        for one, other in ((order[:249], order[249:]), (order[249:], order[:249])):
            temperature = fit_temperature(made.take(one)).temperature
            rest = made.take(other)
            gains.append(score_predictions(rest)["nll"] - score_predictions(rest, temperature=temperature)["nll"])
            rows.append(len(other))
    assert found.fitted.gain == pytest.approx(np.average(gains, weights=rows), abs=1e-6)


def test_few_examples_are_added_up_too_where_that_can_be_told():
    made = some_predictions(3, 100, scale=2.0)
    weighed = fit_weights(made)
    found = fit_temperature(made, weighed)
    plain = fit_temperature(made, Recipe(weighed.weights, fitted=Fitted(100, gain=0.0)))
    assert found.fitted.gain == pytest.approx(weighed.fitted.gain + plain.fitted.gain)
    assert fit_temperature(made, found).fitted.gain is None
    assert fit_temperature(made, Recipe((1, 1, 1), fitted=Fitted(100))).fitted.gain is None
    assert fit_temperature(made, Recipe((1, 1, 1))).fitted == fit_temperature(made).fitted


def test_a_gain_that_cannot_be_told_is_none():
    assert select(some_predictions(2, 3)).fitted.gain is None  # no halves of two
    assert (
        fit_temperature(Predictions.from_probabilities([[[0.6, 0.4]] * 9 + [[0.4, 0.6]]], [0] * 10)).fitted.gain is None
    )
    one = [-100] * 9 + [0]
    lone = Predictions(some_logs(2, 10)[0], one, ignore=-100)
    assert fit_weights(lone).fitted.gain is None  # a half in which nothing counts
    tall = select(Predictions(np.eye(4), np.zeros(4), kind="values")).fitted
    assert tall.gain == pytest.approx(0, abs=0.5)


FITS = [select, fit_weights, fit_temperature, lambda made: fit_cascade(made, tolerance=1.0)]


@pytest.mark.parametrize("fit", FITS)
def test_nothing_is_fitted_on_test_data(fit):
    with pytest.raises(DataError, match="nothing is fitted on test data, got predictions of split 'test'"):
        fit(some_predictions(split="test"))


def test_nothing_is_fitted_on_another_split_than_the_rest_of_the_recipe():
    recipe = fit_weights(some_predictions(split="held-out"))
    other = some_predictions(split="more")
    for fit in (fit_temperature, lambda made, recipe: fit_cascade(made, recipe=recipe, tolerance=1.0)):
        with pytest.raises(DataError, match="fitted on split 'held-out', got predictions of 'more': give the same"):
            fit(other, recipe)
    assert fit_temperature(some_predictions(), recipe).members is None


def test_digests_are_not_forgotten_by_predictions_that_have_none():
    recipe = fit_weights(some_predictions(members=list("abcd")))
    assert fit_temperature(some_predictions(), recipe).members == tuple("abcd")
