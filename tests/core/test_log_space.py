"""Members combined and scored in logarithms, against arithmetic with fifty digits."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.metrics import log_loss

from snapcore.ensemble import combine, prefix_curve
from snapcore.errors import DataError
from snapcore.metrics import as_log_probabilities, brier, ece, error, nll, perplexity, row_scores, score, summary

from .predicting import log_probabilities, log_softmax, some_logs


def with_fifty_digits(members, weights=None):
    """ln(sum_i w_i e^l_i / sum_i w_i), one number at a time."""
    weights = [1] * len(members) if weights is None else weights
    result = np.empty(members[0].shape)
    with mpmath.workdps(50):
        for place in np.ndindex(result.shape):
            powers = [
                mpmath.mpf(float(w)) * mpmath.exp(mpmath.mpf(float(member[place])))
                for w, member in zip(weights, members, strict=True)
            ]
            mean = mpmath.fsum(powers) / mpmath.fsum(map(float, weights))
            result[place] = float(mpmath.log(mean)) if mean else -np.inf
    return result


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 30.0, 3000.0]), st.booleans())
@settings(max_examples=25)
def test_six_members_in_log_space_are_those_of_fifty_digits(seed, scale, weighted):
    rng = np.random.default_rng(seed)
    members = np.maximum(log_softmax(scale * rng.normal(size=(6, 4, 3))), -1e4)
    members[rng.random(members.shape) < 0.1] = -np.inf
    weights = rng.random(6) if weighted else None
    expected = with_fifty_digits(members, weights)
    np.testing.assert_allclose(combine(members, weights=weights, log=True), expected, rtol=1e-12, atol=1e-12)


@given(log_probabilities(), st.data())
def test_the_last_m_members_in_log_space_are_those_of_scipy(data, draw):
    logs = data[0].astype(np.float64)
    m = draw.draw(st.integers(1, len(logs)))
    weights = np.array(draw.draw(st.lists(st.floats(0.0, 10.0), min_size=m, max_size=m)))
    weights[-1] += 0.5
    with np.errstate(all="ignore"):
        expected = logsumexp(logs[-m:], axis=0, b=(weights / weights.sum()).reshape(-1, 1, 1))
    np.testing.assert_allclose(combine(logs, last=m, weights=weights, log=True), expected, rtol=1e-12, atol=1e-12)


def test_a_member_of_weight_zero_does_not_count_in_log_space():
    logs = some_logs(3)[0]
    found = combine(logs, weights=[0, 1, 3], log=True)
    np.testing.assert_allclose(found, np.log(0.25 * np.exp(logs[1]) + 0.75 * np.exp(logs[2])))


@given(log_probabilities())
def test_an_iterator_of_logarithms_is_streamed_to_the_same_answer(data):
    logs, _ = data
    streamed = combine(iter(logs), log=True)
    assert streamed.dtype == np.float32
    np.testing.assert_allclose(streamed, combine(logs, log=True), rtol=1e-6)


def test_a_label_that_all_members_find_impossible_stays_impossible():
    logs = np.array([[[0.0, -np.inf]], [[0.0, -np.inf]]])
    np.testing.assert_array_equal(combine(logs, log=True), [[0.0, -np.inf]])


def test_no_logarithms_are_refused():
    with pytest.raises(DataError, match="at least one member is required, got none"):
        combine(iter([]), log=True)


@pytest.mark.parametrize("value", [0.5, math.nan, math.inf])
def test_what_is_no_logarithm_of_a_probability_is_refused_by_member_and_position(value):
    logs = some_logs()[0]
    logs[1, 2, 0] = value
    message = (
        rf"combine averages log-probabilities; member \[-3\] must be at most 0 and not NaN, got {value:g} at \[2, 0"
    )
    with pytest.raises(DataError, match=message):
        combine(logs, log=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [([[-1.0], [-1.0, -2.0]], "a regular array"), (["x"], "real numbers, got dtype <U1"), ([1j], "real numbers")],
)
def test_what_is_no_array_of_numbers_is_refused(values, message):
    with pytest.raises(DataError, match=f"logs must be {message}"):
        as_log_probabilities(values, "logs")


def test_logarithms_of_different_shapes_are_refused():
    with pytest.raises(DataError, match=r"must have one shape, got \(1, 3\) for member \[1\] and \(6, 3\) before it"):
        combine(iter([np.full((6, 3), -1.1), np.full((1, 3), -1.1)]), log=True)


def test_a_label_at_minus_1000_nats_costs_1000():
    logs = [[0.0, -1000.0], [0.0, -1e4]]
    assert nll(logs, [1, 0], log=True) == 500.0
    assert nll(logs, [0, 1], log=True) == 5000.0
    assert nll(np.exp(logs), [0, 1]) == pytest.approx(708.4 / 2, abs=0.01)  # where a probability is at its end
    assert nll([[0.0, -np.inf]], [1], log=True) == math.inf


@given(log_probabilities())
def test_what_probabilities_can_say_is_said_the_same_in_logarithms(data):
    logs, labels = data[0][0].astype(np.float64), data[1]
    p = np.exp(logs)
    for measure in (error, brier, ece):
        assert measure(logs, labels, log=True) == measure(p, labels)
    if p[np.arange(len(labels)), labels].min() > 1e-300:
        assert nll(logs, labels, log=True) == pytest.approx(nll(p, labels), rel=1e-12)
    expected = math.fsum(-logs[range(len(labels)), labels])
    assert nll(logs, labels, log=True) == pytest.approx(expected / len(labels), rel=1e-12)


@given(log_probabilities(impossible=False))
def test_the_rows_of_parts_joined_are_those_of_the_whole(data):
    logs, labels = data[0][0], data[1]
    parts = [row_scores(logs[part], labels[part], log=True) for part in ([i] for i in range(len(labels)))]
    whole = row_scores(logs, labels, log=True)
    for part, all_ in zip(zip(*parts, strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(part), all_)
    assert summary(whole) == score(logs, labels, log=True)


@given(log_probabilities(impossible=False))
def test_perplexity_is_e_to_the_log_loss_of_scikit_learn(data):
    p, labels = np.exp(np.maximum(data[0][0].astype(np.float64), -20)), data[1]
    p /= p.sum(axis=1, keepdims=True)
    expected = math.exp(log_loss(labels, p, labels=range(p.shape[1])))
    assert perplexity(p, labels) == pytest.approx(expected, rel=1e-9)
    assert perplexity(np.log(p), labels, log=True) == pytest.approx(expected, rel=1e-9)


def test_a_perplexity_beyond_float64_is_infinite():
    assert perplexity([[0.0, -1000.0]], [1], log=True) == math.inf


@given(log_probabilities())
def test_row_m_of_the_curve_is_the_score_of_the_last_m_in_log_space(data):
    logs, labels = data[0].astype(np.float64), data[1]
    expected = [{"m": m, **score(combine(logs, last=m, log=True), labels, log=True)} for m in range(1, len(logs) + 1)]
    assert prefix_curve(logs, labels, log=True) == expected


def test_a_curve_needs_labels():
    with pytest.raises(DataError, match="labels are missing"):
        prefix_curve(some_logs()[0], log=True)
