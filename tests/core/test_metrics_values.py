"""The measures of values and of uncertainty, against scikit-learn, SciPy and integrals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, root_mean_squared_error

from snapcore.errors import DataError
from snapcore.metrics import auroc, crps, gaussian_nll, risk_coverage, rmse

numbers = st.floats(-1e3, 1e3)
some_numbers = arrays(np.float64, st.integers(1, 30), elements=numbers)


@given(some_numbers, st.integers(0, 99))
def test_rmse_is_that_of_scikit_learn(values, seed):
    targets = np.random.default_rng(seed).normal(size=values.shape)
    assert rmse(values, targets) == pytest.approx(root_mean_squared_error(targets, values))


@given(numbers, st.floats(1e-3, 1e3), numbers)
def test_the_nll_of_a_normal_is_that_of_scipy(mean, variance, target):
    expected = -norm.logpdf(target, mean, math.sqrt(variance))
    assert gaussian_nll([mean], [variance], [target]) == pytest.approx(expected, rel=1e-9)


def integral(weights, means, deviations, target):
    """The definition: the squared distance of the distribution from that of one who knew."""

    def below(x):
        return float(np.dot(weights, norm.cdf(x, means, deviations)))

    reach = 12 * max(deviations)
    ends = sorted([min([*means, target]) - reach, target, max([*means, target]) + reach])
    left = quad(lambda x: below(x) ** 2, ends[0], target, limit=200, points=sorted(means))[0]
    right = quad(lambda x: (below(x) - 1) ** 2, target, ends[2], limit=200, points=sorted(means))[0]
    return left + right


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=20)
def test_crps_is_its_integral_for_one_normal_and_for_mixtures(seed, n_members):
    rng = np.random.default_rng(seed)
    means, variances, weights = (
        rng.normal(size=n_members),
        rng.uniform(0.1, 2, n_members),
        rng.dirichlet([1] * n_members),
    )
    target = rng.normal() * 2
    expected = integral(weights, means, np.sqrt(variances), target)
    found = crps(means[:, None], variances[:, None], [target], weights=5 * weights)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    if n_members == 1:
        assert crps(means, variances, [target]) == pytest.approx(expected, rel=1e-5)


def test_crps_is_a_mean_over_targets_of_any_shape():
    rng = np.random.default_rng(0)
    means, variances, targets = rng.normal(size=(3, 4, 5)), rng.random((3, 4, 5)) + 0.1, rng.normal(size=(4, 5))
    each = [crps(means[:, i, j], variances[:, i, j], targets[i, j]) for i in range(4) for j in range(5)]
    assert crps(means, variances, targets) == pytest.approx(np.mean(each))
    assert crps(means[0], variances[0], targets) == pytest.approx(crps(means[:1], variances[:1], targets))


def test_crps_of_a_variance_near_0_is_the_mean_absolute_error():
    assert crps([1.0, 2.0], [1e-30, 1e-30], [3.0, 2.5]) == pytest.approx(1.25)


@pytest.mark.parametrize("weights", [[1.0], [1, -1], [0, 0], [math.nan, 1], [math.inf, 1]])
def test_weights_of_a_mixture_that_do_not_fit_are_refused(weights):
    with pytest.raises(DataError, match="weights must be 2 numbers, not negative and not all 0"):
        crps([[0.0], [1.0]], [[1.0], [1.0]], [0.0], weights=weights)


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_that_of_scikit_learn_equal_scores_included(pairs):
    scores, positives = np.array([score for score, _ in pairs], float), np.array([flag for _, flag in pairs])
    if positives.all() or not positives.any():
        with pytest.raises(DataError, match="positives must be some and not all of the examples"):
            auroc(scores, positives)
    else:
        assert auroc(scores, positives) == pytest.approx(roc_auc_score(positives, scores))


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=1, max_size=20))
def test_the_risk_is_that_of_the_surest_whatever_the_order_of_equals(pairs):
    scores, losses = np.array(pairs, float).T
    found = risk_coverage(scores, losses)
    for k in range(1, len(scores) + 1):
        edge = np.sort(scores)[k - 1]
        before, equal = scores < edge, scores == edge
        risk = (losses[before].sum() + (k - before.sum()) * losses[equal].mean()) / k
        assert found.risk[k - 1] == pytest.approx(risk, abs=1e-12)
        assert found.coverage[k - 1] == k / len(scores)
    assert found.area == pytest.approx(found.risk.mean())
    order = np.random.default_rng(0).permutation(len(scores))
    np.testing.assert_allclose(risk_coverage(scores[order], losses[order]).risk, found.risk, atol=1e-12)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: rmse([1.0], [1.0, 2.0]), r"values and targets must have one shape, got \(2,\) and \(1,\)"),
        (lambda: rmse([], []), r"at least one example is required, got shape \(0,\) for values"),
        (lambda: rmse(["a"], [1.0]), "values must be real numbers, got dtype <U1"),
        (lambda: rmse([[1.0], [1.0, 2.0]], [1.0]), "values must be a regular array"),
        (lambda: rmse([1.0, math.nan], [1.0, 1.0]), r"values must be finite, got nan at \[1\]"),
        (lambda: rmse([1.0], [math.inf]), r"targets must be finite, got inf at \[0\]"),
        (lambda: gaussian_nll([0.0], [0.0], [0.0]), "variance must be above 0, got 0; take exp of a log-variance"),
        (lambda: gaussian_nll([0.0], [[1.0]], [0.0]), r"mean and variance and targets must have one shape"),
        (lambda: crps([0.0], [-1.0], [0.0]), "variance must be above 0, got -1"),
        (lambda: crps([[0.0]], [[1.0]], [0.0, 1.0]), r"must have one shape, got \(2,\) and \(1, 1\)"),
        (lambda: crps([[0.0], [1.0, 2.0]], [1.0], [0.0]), "mean must be a regular array"),
        (lambda: auroc([1.0, 2.0], [0, 2]), "positives must be booleans, or 0 and 1, got 2"),
        (lambda: auroc([math.nan, 2.0], [0, 1]), "scores must be finite"),
        (lambda: risk_coverage([1.0], [math.nan]), "losses must be finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(asked, message):
    with pytest.raises(DataError, match=message):
        asked()
