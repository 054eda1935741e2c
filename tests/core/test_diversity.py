"""Diversity, against the definitions pair by pair, and the decomposition of an ensemble's loss as an identity."""

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import diversity
from snapcore.diversity import ambiguity, correlation, disagreement, double_fault, weight_distance
from snapcore.ensemble import Predictions, combine
from snapcore.errors import DataError
from snapcore.metrics import brier, error, nll

from .predicting import log_probabilities, some_logs, some_predictions


@st.composite
def members(draw):
    """Probabilities [members, examples, classes] that are never quite equal, and labels."""
    shape = [draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(2, 4))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.dirichlet(np.full(shape[2], draw(st.sampled_from([0.3, 1.0, 9.0]))), size=shape[:2]), rng.integers(
        shape[2], size=shape[1]
    )


@given(members())
def test_the_correlation_is_that_of_numpy_over_all_outputs(data):
    p, _ = data
    expected = np.corrcoef(p.reshape(len(p), -1)).reshape(len(p), len(p))
    np.testing.assert_allclose(correlation(p), expected, atol=1e-9)


@given(members())
def test_pairs_disagree_and_fail_together_as_counted_one_by_one(data):
    p, labels = data
    decided = p.argmax(axis=-1).tolist()
    apart, both = disagreement(p), double_fault(p, labels)
    for i, one in enumerate(decided):
        for j, other in enumerate(decided):
            n = len(labels)
            assert apart[i, j] == pytest.approx(sum(a != b for a, b in zip(one, other, strict=True)) / n)
            wrong = sum(y not in pair for *pair, y in zip(one, other, labels, strict=True))
            assert both[i, j] == pytest.approx(wrong / n)
        assert 100 * both[i, i] == pytest.approx(error(p[i], labels))


@pytest.mark.parametrize(("score", "loss"), [("nll", nll), ("brier", brier)])
@given(data=members())
def test_the_ensemble_loses_what_its_members_lose_less_their_diversity(score, loss, data):
    p, labels = data
    p = 0.999 * p + 0.001 / p.shape[-1]
    member, diverse, ensemble = ambiguity(p, labels, score)
    assert ensemble == pytest.approx(member - diverse, abs=1e-12)
    assert member == pytest.approx(np.mean([loss(each, labels) for each in p]))
    assert ensemble == pytest.approx(loss(combine(p), labels))
    assert diverse >= -1e-12
    if len(p) == 1:
        assert diverse == pytest.approx(0, abs=1e-12)


@given(log_probabilities(impossible=False))
def test_the_identity_holds_where_probabilities_underflow(data):
    made = Predictions(*data)
    member, diverse, ensemble = ambiguity(made)
    assert ensemble == pytest.approx(member - diverse, rel=1e-12, abs=1e-12)
    assert ensemble == pytest.approx(nll(combine(made[:].astype(np.float64), log=True), made.labels, log=True))


def test_the_diversity_of_brier_is_the_members_distance_from_their_mean():
    p, labels = np.exp(some_logs(3)[0]), some_logs(3)[1]
    pairs = np.mean([((one - other) ** 2).sum(-1).mean() for one in p for other in p])
    assert ambiguity(p, labels, "brier")[1] == pytest.approx(pairs / 2)


@pytest.mark.parametrize(
    "asked", [correlation, disagreement, double_fault, ambiguity, lambda made: ambiguity(made, score="brier")]
)
def test_predictions_say_the_same_as_their_probabilities(asked):
    made = some_predictions()
    p = np.exp(made[:].astype(np.float64))
    labelled = asked in (correlation, disagreement)
    if labelled:
        expected = asked(p)
    elif asked is double_fault:
        expected = double_fault(p, made.labels)
    else:
        expected = ambiguity(p, made.labels, "nll" if asked is ambiguity else "brier")
    np.testing.assert_allclose(asked(made), expected, rtol=1e-6)


@pytest.mark.parametrize("score", ["nll", "brier"])
def test_labels_that_are_given_count_instead_of_the_predictions_own(score):
    logs, labels = some_logs()
    expected = ambiguity(Predictions(logs, labels), score=score)
    for made in (Predictions(logs), Predictions(logs, (labels + 1) % 3)):
        assert ambiguity(made, labels, score) == expected
        np.testing.assert_array_equal(double_fault(made, labels), double_fault(Predictions(logs, labels)))


@pytest.mark.parametrize("score", ["nll", "brier"])
def test_tokens_that_are_ignored_have_no_part(score):
    logs, labels = some_logs(3, 40)
    hidden = np.arange(40) % 4 == 0
    tokens = np.where(hidden, -100, labels).reshape(8, 5)
    made = Predictions(logs.reshape(3, 8, 5, 3), tokens, ignore=-100)
    rest = Predictions(logs[:, ~hidden], labels[~hidden])
    assert ambiguity(made, score=score) == pytest.approx(ambiguity(rest, score=score))
    assert ambiguity(Predictions(made[:], ignore=-100), tokens, score) == ambiguity(made, score=score)
    np.testing.assert_allclose(double_fault(made), double_fault(rest))
    dense = np.exp(logs).reshape(3, 8, 5, 3)
    np.testing.assert_allclose(double_fault(dense, labels.reshape(8, 5)), double_fault(np.exp(logs), labels))
    np.testing.assert_allclose(disagreement(dense), disagreement(np.exp(logs)))


def test_a_label_that_a_member_finds_impossible_has_no_nll_to_split():
    p = [[[1.0, 0.0]], [[0.5, 0.5]]]
    for given_ in ((p, [1]), (Predictions.from_probabilities(p, [1]), None)):
        with pytest.raises(DataError, match="a label has probability 0 under a member, whose loss is infinite"):
            ambiguity(*given_)
        assert ambiguity(*given_, "brier")[0] == pytest.approx((2 + 0.5) / 2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: correlation([[0.5, 0.5]]), r"members must be \[members, examples, classes\], got shape \(1, 2\)"),
        (lambda: disagreement(np.empty((2, 0, 3))), r"got shape \(2, 0, 3\)"),
        (lambda: correlation([[[2.0, -1.0]]]), r"members must be finite and in 0\.\.1"),
        (lambda: correlation(np.full((2, 3, 2), 0.5)), r"member \[0\] gives the same output everywhere"),
        (lambda: correlation(Predictions([[1.0]], kind="values")), "diversity is of classes, got .* kind 'values'"),
        (lambda: double_fault([[[0.5, 0.5]]]), r"labels are missing: pass \[examples\] class numbers"),
        (lambda: ambiguity(Predictions(some_logs()[0])), "labels are missing"),
        (lambda: double_fault([[[0.5, 0.5]]], [2]), r"labels must be in 0\.\.1, got 2"),
        (lambda: double_fault([[[0.5, 0.5]]], [0, 1]), r"labels must have shape \(1,\)"),
        (lambda: ambiguity([[[0.5, 0.5]]], [0], "error"), "score must be 'nll' or 'brier', got 'error'"),
        (lambda: weight_distance([{"w": np.ones(2)}, {"w": np.ones(3)}]), r"the same tensors: \[1\] has others than"),
        (lambda: weight_distance([{"w": np.ones(2)}, {"v": np.ones(2)}]), r"the same tensors: \[1\]"),
    ],
)
def test_what_has_no_diversity_is_refused(asked, message):
    with pytest.raises(DataError, match=message):
        asked()


@pytest.mark.parametrize("kept", [True, False])
def test_many_blocks_say_what_the_whole_says(kept):
    logs, labels = some_logs(3, 40_000)
    made = Predictions(logs, labels)
    assert len([*made.blocks()]) > 2
    p = np.exp(made[:].astype(np.float64)) if kept else np.exp(logs)
    given_ = (made,) if kept else (p, labels)
    np.testing.assert_allclose(correlation(given_[0]), np.corrcoef(p.reshape(3, -1)), rtol=1e-12)
    decided = p.argmax(-1)
    wrong = decided != labels
    for i, j in [(0, 1), (0, 2), (2, 2)]:
        assert disagreement(given_[0])[i, j] == np.mean(decided[i] != decided[j])
        assert double_fault(*given_)[i, j] == np.mean(wrong[i] & wrong[j])
    of_the_label = p[:, np.arange(len(labels)), labels]
    target = np.eye(3)[labels]
    mean, gap, whole = ambiguity(*given_)
    assert mean == pytest.approx(-np.log(of_the_label).mean(), rel=1e-12)
    assert whole == pytest.approx(-np.log(of_the_label.mean(0)).mean(), rel=1e-12)
    assert gap == pytest.approx(mean - whole, rel=1e-11)
    mean, gap, whole = ambiguity(*given_, score="brier")
    assert mean == pytest.approx(((p - target) ** 2).sum(-1).mean(), rel=1e-12)
    assert whole == pytest.approx(((p.mean(0) - target) ** 2).sum(-1).mean(), rel=1e-12)
    assert gap == pytest.approx(mean - whole, rel=1e-11)


def test_weights_are_as_far_apart_as_their_vectors():
    rng = np.random.default_rng(0)
    members = [
        {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=4), "steps": np.array(i), "on": i > 0}
        for i in range(3)
    ]
    vectors = [np.concatenate([each["a"].ravel(), each["b"]]) for each in members]
    expected = [[math.dist(one, other) for other in vectors] for one in vectors]
    np.testing.assert_allclose(weight_distance(members), expected)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(diversity).failed == 0


@pytest.mark.parametrize("measure", [correlation, disagreement])
def test_what_is_ignored_does_not_count(measure):
    rng = np.random.default_rng(8)
    p = rng.dirichlet(np.ones(4), size=(3, 50))
    labels = rng.integers(4, size=50)
    counts = rng.random(50) < 0.6
    masked = Predictions.from_probabilities(p, np.where(counts, labels, -100), ignore=-100)
    np.testing.assert_allclose(measure(masked), measure(p[:, counts]), atol=1e-6)
