"""The four measures, against scikit-learn and the formulas written a second way."""

import doctest
import importlib
import math
import pkgutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from snapcore import metrics
from snapcore.errors import DataError, SnapcoreError
from snapcore.metrics import as_probabilities, brier, ece, error, nll, score

MEASURES = [error, nll, brier, ece, score]


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@st.composite
def predictions(draw, max_classes=7):
    """Probabilities and labels of a few examples, from sure to undecided, right and wrong."""
    n, classes = draw(st.integers(1, 40)), draw(st.integers(2, max_classes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(n, classes)) * draw(st.sampled_from([0.1, 1.0, 5.0, 12.0]))
    return softmax(logits), rng.integers(classes, size=n)


def ece_in_words(probabilities, labels, bins):
    """The definition, one bin and one example at a time."""
    total = 0.0
    for b in range(bins):
        inside = [
            (max(row), int(np.argmax(row)) == label)
            for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
            if b / bins < max(row) <= (b + 1) / bins
        ]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


@given(predictions())
def test_error_is_one_minus_the_accuracy_of_scikit_learn_in_percent(data):
    p, y = data
    assert error(p, y) == pytest.approx(100 * (1 - accuracy_score(y, p.argmax(axis=1))))


@given(predictions())
def test_nll_is_the_log_loss_of_scikit_learn(data):
    p, y = data
    p = 0.99 * p + 0.01 / p.shape[1]  # scikit-learn clips at 2.2e-16, snapcore at 2.2e-308
    assert nll(p, y) == pytest.approx(log_loss(y, p, labels=range(p.shape[1])), rel=1e-9)


@given(predictions())
def test_nll_is_minus_the_mean_log_of_what_the_labels_were_given(data):
    p, y = data
    expected = math.fsum(-math.log(p[i, label]) for i, label in enumerate(y)) / len(y)
    assert nll(p, y) == pytest.approx(expected, rel=1e-12)


@given(predictions())
def test_brier_is_the_unhalved_brier_score_of_scikit_learn(data):
    p, y = data
    expected = brier_score_loss(y, p, labels=range(p.shape[1]), scale_by_half=False)
    assert brier(p, y) == pytest.approx(expected, rel=1e-9)


@given(predictions(), st.integers(1, 30))
def test_ece_is_its_definition_bin_by_bin(data, bins):
    p, y = data
    assert ece(p, y, bins=bins) == pytest.approx(ece_in_words(p, y, bins), abs=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    p = np.array([[0.5, 0.5], [0.25, 0.75], [0.0, 1.0]])
    y = np.array([0, 0, 1])
    # with 2 bins 0.5 is alone in (0, 0.5]; 0.75 and 1.0 share (0.5, 1]: |1 - 0.5| / 3 + |1 - 1.75| / 3
    assert ece(p, y, bins=2) == pytest.approx((0.5 + 0.75) / 3)


@given(predictions())
def test_score_is_the_four_measures(data):
    p, y = data
    assert score(p, y) == {"error": error(p, y), "nll": nll(p, y), "brier": brier(p, y), "ece": ece(p, y)}


@given(predictions())
def test_every_measure_stays_within_its_range(data):
    got = score(*data)
    assert 0 <= got["error"] <= 100
    assert 0 <= got["nll"] < 708.4
    assert 0 <= got["brier"] <= 2
    assert 0 <= got["ece"] <= 1
    assert all(type(value) is float for value in got.values())


def test_a_perfect_prediction_scores_zero_everywhere():
    got = score(np.eye(4), np.arange(4))
    assert got == {"error": 0.0, "nll": 0.0, "brier": 0.0, "ece": 0.0}
    assert math.copysign(1, got["nll"]) == 1


def test_a_sure_and_wrong_prediction_costs_a_finite_nll():
    assert nll([[1.0, 0.0]], [1]) == pytest.approx(1022 * math.log(2))  # tiny is 2**-1022


def test_of_equally_probable_classes_the_first_is_the_prediction():
    assert error([[0.5, 0.5], [0.5, 0.5]], [0, 1]) == 50.0


def test_float32_predictions_are_scored_in_float64():
    p = softmax(np.random.default_rng(0).normal(size=(100, 3))).astype(np.float32)
    y = np.arange(100) % 3
    assert score(p, y) == score(p.astype(np.float64), y)


def test_input_is_left_as_it_was():
    p, y = softmax(np.random.default_rng(1).normal(size=(9, 3))), np.arange(9) % 3
    before = p.copy()
    score(p, y)
    np.testing.assert_array_equal(p, before)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_labels_may_be_any_integers(dtype):
    assert error(np.eye(3), np.array([0, 1, 1], dtype=dtype)) == pytest.approx(100 / 3)


@pytest.mark.parametrize("measure", MEASURES)
def test_dense_predictions_are_refused_so_no_accuracy_can_be_750_percent(measure):
    """TorchEnsemble divides the right pixels by the number of images; `error` is 0..100 or nothing."""
    p, y = softmax(np.zeros((2, 3, 8, 8))), np.zeros((2, 8, 8), dtype=int)
    with pytest.raises(DataError, match=r"\[examples, classes\], got shape \(2, 3, 8, 8\); flatten"):
        measure(p, y)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_named_with_its_position_and_the_range(measure, label):
    with pytest.raises(DataError, match=rf"in 0\.\.2, got {label} at position 1;"):
        measure(np.eye(3), [0, label, 7])


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([0.5, 0.5], [0], r"\[examples, classes\], got shape \(2,\)"),
        (np.eye(3), [0, 1], r"\[examples=3\], got shape \(2,\)"),
        (np.eye(3), np.eye(3), r"\[examples=3\], got shape \(3, 3\); give one class number"),
        (np.eye(2), [0.0, 1.0], "labels must be integers, got dtype float64"),
        (np.eye(2), [True, False], "labels must be integers, got dtype bool"),
        (np.eye(2), [[0], [1, 0]], "labels must be a regular array"),
        ([[0.5, 0.5], [1.0]], [0, 1], "probabilities must be a regular array"),
        ([["a", "b"]], [0], "must be real numbers, got dtype <U1"),
        ([[0.5 + 0j, 0.5]], [0], "must be real numbers, got dtype complex128"),
        (np.empty((0, 3)), [], r"at least one example and one class are required, got shape \(0, 3\)"),
        (np.empty((3, 0)), [0, 0, 0], r"at least one example and one class"),
        ([[0.5, 0.5], [-2.5, 3.5]], [0, 1], r"in 0\.\.1, got -2\.5 at \[1, 0\]; apply softmax first"),
        ([[0.5, math.nan]], [0], r"finite and in 0\.\.1, got nan at \[0, 1\]"),
        ([[0.5, math.inf]], [0], r"finite and in 0\.\.1, got inf at \[0, 1\]"),
        ([[0, 255]], [0], r"finite and in 0\.\.1, got 255 at \[0, 1\]"),
    ],
)
def test_what_is_no_prediction_is_refused_with_what_was_got(measure, p, y, message):
    with pytest.raises(DataError, match=message) as caught:
        measure(p, y)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SnapcoreError)


@pytest.mark.parametrize("bins", [0, -3])
def test_ece_needs_at_least_one_bin(bins):
    with pytest.raises(DataError, match=f"bins must be at least 1, got {bins}"):
        ece(np.eye(2), [0, 1], bins=bins)


def test_a_probability_that_float32_rounded_above_one_is_taken_as_one():
    above = np.nextafter(np.float32(1), np.float32(2))
    assert nll(np.array([[above, 0]], dtype=np.float32), [0]) == 0.0
    assert ece(np.array([[above, 0]], dtype=np.float32), [0]) == pytest.approx(0, abs=1e-6)


def test_checking_an_array_does_not_copy_it():
    array = np.full((2, 3), 0.5, dtype=np.float16)
    assert as_probabilities(array, "probabilities") is array


def test_the_examples_in_the_docstrings_hold():
    for module in pkgutil.iter_modules(metrics.__path__):
        found = doctest.testmod(importlib.import_module(f"snapcore.metrics.{module.name}"))
        assert (found.failed, found.attempted > 0) == (0, True), module.name
