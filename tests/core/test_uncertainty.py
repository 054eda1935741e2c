"""Uncertainty in its parts, against the formulae written directly, and its quality, against scikit-learn and SciPy."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, spearmanr
from sklearn.metrics import roc_auc_score

from snapcore.ensemble import Predictions, rank_correlation, uncertainty, uncertainty_quality
from snapcore.errors import DataError

from .predicting import log_probabilities, some_logs, some_predictions

PARTS = ("total", "aleatoric", "epistemic", "disagreement")


@given(log_probabilities(), st.integers(0, 99))
def test_of_classes_the_parts_are_entropies_and_the_information_between(data, seed):
    made = Predictions(*data)
    weights = np.random.default_rng(seed).random(len(made)) + 0.01
    shares = weights / weights.sum()
    p = np.exp(made[:].astype(np.float64))
    p[p < np.finfo(np.float64).tiny] = 0.0  # their mean may be 0 where they are not, and the divergence infinite
    mean = np.tensordot(shares, p, 1)
    found = uncertainty(made, weights=weights)
    aleatoric = shares @ entropy(p, axis=-1)
    # mutual information as the mean divergence of the members from their mean
    information = shares @ entropy(p, np.broadcast_to(mean, p.shape), axis=-1)
    tolerance = 1e-5  # rows of float32 sum to nearly 1, and SciPy divides by their sums
    np.testing.assert_allclose(found.total, entropy(mean, axis=-1), atol=tolerance)
    np.testing.assert_allclose(found.aleatoric, aleatoric, atol=tolerance)
    np.testing.assert_allclose(found.epistemic, information, atol=tolerance)
    np.testing.assert_allclose(found.disagreement, shares @ (p.argmax(-1) != mean.argmax(-1)), atol=1e-12)


@given(log_probabilities())
def test_no_part_is_below_0_and_the_parts_make_the_total(data):
    found = uncertainty(Predictions(*data))
    for part in found:
        assert part.shape == data[1].shape
        assert part.dtype == np.float64
        assert part.min() >= 0
    np.testing.assert_allclose(found.aleatoric + found.epistemic, found.total, atol=1e-5)
    assert found.total.max() <= math.log(data[0].shape[-1]) + 1e-5


def test_members_that_agree_leave_nothing_between_them():
    logs, _ = some_logs(1)
    found = uncertainty(Predictions(np.repeat(logs, 3, axis=0)))
    np.testing.assert_allclose(found.epistemic, 0, atol=1e-12)
    assert found.disagreement.tolist() == [0.0] * 30


def test_of_several_labels_the_decisions_are_added_up():
    p = np.random.default_rng(0).random((3, 7, 4))
    p[:, 0], p[:, 1] = 0.0, 1.0
    found = uncertainty(Predictions.from_probabilities(p, kind="labels"))
    mean = p.mean(axis=0)
    total = entropy([mean, 1 - mean], axis=0).sum(axis=-1)
    aleatoric = entropy([p, 1 - p], axis=0).mean(axis=0).sum(axis=-1)
    np.testing.assert_allclose(found.total, total, atol=1e-5)
    np.testing.assert_allclose(found.aleatoric, aleatoric, atol=1e-5)
    np.testing.assert_allclose(found.epistemic, total - aleatoric, atol=1e-5)
    np.testing.assert_allclose(found.disagreement, ((p > 0.5) != (mean > 0.5)).mean(axis=(0, 2)))
    assert found.total[:2].tolist() == [0.0, 0.0]


def test_of_values_the_parts_are_variances_within_and_between():
    means, variances = np.random.default_rng(1).normal(size=(4, 6)), np.random.default_rng(2).random((4, 6)) + 0.1
    found = uncertainty(Predictions(np.stack([means, variances], -1), kind="gaussian"))
    np.testing.assert_allclose(found.aleatoric, variances.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.epistemic, means.var(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.total, variances.mean(axis=0) + means.var(axis=0), rtol=1e-5)
    assert np.isnan(found.disagreement).all()
    plain = uncertainty(Predictions(means, kind="values"))
    np.testing.assert_allclose(plain.total, means.var(axis=0), rtol=1e-5)
    assert plain.aleatoric.tolist() == [0.0] * 6


def test_of_tokens_each_has_its_own_and_a_sequence_their_sum():
    logs, labels = some_logs(3, 40)
    tokens = labels.reshape(8, 5).copy()
    tokens[:, 4] = -100
    made = Predictions(logs.reshape(3, 8, 5, 3), tokens, ignore=-100)
    flat, found = uncertainty(Predictions(logs)), uncertainty(made)
    for name in PARTS:
        each = getattr(flat, name).reshape(8, 5)
        np.testing.assert_allclose(getattr(found, name)[:, :4], each[:, :4])
        assert getattr(found, name)[:, 4].tolist() == [0.0] * 8
        np.testing.assert_allclose(getattr(found.summed(), name), each[:, :4].sum(axis=1))
    unlabelled = uncertainty(Predictions(logs.reshape(3, 8, 5, 3), ignore=-100))
    np.testing.assert_allclose(unlabelled.total, flat.total.reshape(8, 5))


def test_blocks_are_joined_in_their_order():
    made = some_predictions(2, 25_000)
    some = made.take(range(12_000, 25_000))
    np.testing.assert_allclose(uncertainty(made).total[12_000:], uncertainty(some).total)


# --- how well it tells


@pytest.mark.filterwarnings("ignore:aleatoric and epistemic")
@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=20)
def test_the_quality_is_that_of_scikit_learn_and_scipy(seed, padded):
    logs, labels = some_logs(3, 60, seed=seed)
    hidden = np.arange(60) % 7 == 0 if padded else np.zeros(60, bool)
    parts, wrong = uncertainty(Predictions(logs)), np.exp(logs).mean(axis=0).argmax(-1) != labels
    assume(wrong[~hidden].any())
    found = uncertainty_quality(Predictions(logs, np.where(hidden, -100, labels), ignore=-100))
    for name in PARTS:
        score = getattr(parts, name)[~hidden]
        assert found[name]["auroc"] == pytest.approx(roc_auc_score(wrong[~hidden], score))
        assert 0 <= found[name]["area"] <= 1
    expected = spearmanr(parts.aleatoric[~hidden], parts.epistemic[~hidden]).statistic
    assert found["parts"]["rank_correlation"] == pytest.approx(expected)


def test_two_numbers_that_say_the_same_are_warned_of():
    """Two members that are the less sure the more they differ."""
    level = np.linspace(0.01, 0.49, 50)
    one, other = np.stack([1 - level, level], -1), np.stack([1 - level / 2, level / 2], -1)
    labels = (np.arange(50) % 5 == 0).astype(int)
    made = Predictions.from_probabilities([one, other], labels)
    with pytest.warns(UserWarning, match=r"rank the examples alike \(rank correlation 1\.00\): use the total alone"):
        uncertainty_quality(made)


def test_one_member_has_no_epistemic_part_to_rank():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(uncertainty_quality(some_predictions(1))["parts"]["rank_correlation"])


def test_errors_are_of_classes_and_some_must_be_made():
    with pytest.raises(DataError, match="errors are of classes alone, got predictions of kind 'values'"):
        uncertainty_quality(Predictions([[1.0]], [1.0], kind="values"))
    made = some_predictions(1)
    with pytest.raises(DataError, match=r"some predictions must be wrong .*, got 0 wrong of 30"):
        uncertainty_quality(Predictions(made[:], made[0].argmax(-1)))


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2))
def test_the_rank_correlation_is_that_of_scipy(pairs):
    a, b = np.array(pairs, np.float64).T
    if min(np.ptp(a), np.ptp(b)) == 0:
        assert math.isnan(rank_correlation(a, b))
    else:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
