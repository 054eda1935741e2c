"""Verdicts on paired scores: exact tests against enumeration, intervals against simulated truth, sentences."""

import importlib
import itertools
import math
import os
import sys

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

import snapcore.verdict
from snapcore import DataError
from snapcore.verdict import compare_examples, compare_paired, ensemble_equivalent, in_words, pairs_needed

SIMULATED = int(os.environ.get("SNAPCORE_SIMULATIONS", "1000"))
"""Comparisons simulated for each promise; `make statistics` has twenty times as many."""
SPREADS = {
    "normal": lambda random, n: random.normal(size=n),
    "heavy-tailed": lambda random, n: random.standard_t(3, size=n),
    "skewed": lambda random, n: random.exponential(size=n) - 1.0,
}


def by_hand(differences):
    """The p of the exact sign-flip test, in integers: thousandths."""
    exact = [round(1000 * d) for d in differences]
    observed = abs(sum(exact))
    flips = list(itertools.product((1, -1), repeat=len(exact)))
    as_large = sum(abs(sum(s * d for s, d in zip(signs, exact, strict=True))) >= observed for signs in flips)
    return as_large / len(flips)


@given(st.lists(st.integers(-40, 40), min_size=2, max_size=9))
def test_p_is_that_of_counting_every_sign_flip(differences):
    found = compare_paired(differences, [0] * len(differences))
    assert found.p == pytest.approx(min(1.0, by_hand(differences)), abs=1e-12)
    assert found.difference == pytest.approx(float(np.mean(differences)))


@given(st.lists(st.floats(-1, 1), min_size=7, max_size=9, unique=True))
def test_the_interval_holds_the_differences_that_the_test_does_not_reject(differences):
    """At both ends the test of that very difference stands between the two levels next to 5 %."""
    differences = np.round(differences, 3)
    found = compare_paired(differences, np.zeros(len(differences)))
    width = found.high - found.low
    if width > 0.05:
        inside, outside = np.round([found.low + 0.2 * width, found.low - 0.2 * width], 3)
        assert by_hand(differences - inside) > 0.05
        assert by_hand(differences - outside) < 0.1


def test_six_differences_of_one_sign_are_the_fewest_that_decide():
    less, more = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [7.0, 9.5, 9.0, 11.0, 12.5, 13.0]
    assert compare_paired(less, more).verdict == "better"
    assert compare_paired(more, less).verdict == "worse"
    assert compare_paired(less, more).p == 2 / 64
    assert compare_paired(less[:5], more[:5]).verdict is None
    assert compare_paired([*less[:5], 13.1], more).verdict == "undecided"


def test_under_six_pairs_the_interval_is_students():
    """By the table: t at 97.5 % of two degrees of freedom is 4.303."""
    found = compare_paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert (found.low, found.high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)), abs=1e-3)


def test_swapping_the_methods_turns_everything_around():
    random = np.random.default_rng(3)
    a, b = random.normal(size=(2, 8))
    one, other = compare_paired(a, b), compare_paired(b, a)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.p == other.p
    assert one.detectable == pytest.approx(other.detectable)


@pytest.mark.parametrize("pairs", [6, 10, 20])
@pytest.mark.parametrize("spread", SPREADS)
def test_intervals_hold_the_truth_as_often_as_they_say(spread, pairs):
    random = np.random.default_rng(1)
    held = 0
    for _ in range(SIMULATED):
        low, high = snapcore.verdict._typical(0.3 + SPREADS[spread](random, pairs))
        held += low <= 0.3 <= high
    assert (0.88 if spread == "skewed" else 0.93) <= held / SIMULATED <= 0.97


@pytest.mark.parametrize("spread", ["normal", "heavy-tailed"])
def test_where_there_is_no_difference_hardly_anything_is_called_worth_it(spread):
    random = np.random.default_rng(2)
    said = 0
    for _ in range(SIMULATED // 4):
        found = compare_paired(SPREADS[spread](random, 6), np.zeros(6))
        said += in_words(found, "a", "b").startswith("Worth it")
    assert said / (SIMULATED // 4) <= 0.05


def test_a_difference_called_detectable_is_detected_four_times_in_five():
    random = np.random.default_rng(4)
    many = compare_paired(random.normal(size=1000), np.zeros(1000)).detectable * math.sqrt(1000)
    assert many == pytest.approx(1.960 + 0.842, rel=0.05)
    shown = 0
    for _ in range(SIMULATED // 4):
        known = compare_paired(random.normal(size=8) - (2.365 + 0.896) / math.sqrt(8), np.zeros(8))
        shown += known.verdict == "better"
    assert 0.72 <= shown / (SIMULATED // 4) <= 0.9


# Two ensembles that are what they are


def test_over_examples_the_interval_is_near_the_normal_one_where_there_are_many():
    random = np.random.default_rng(5)
    a, b = random.normal(size=(2, 2000))
    found = compare_examples(a - 0.2, b)
    half = 1.96 * np.std(a - b, ddof=1) / math.sqrt(2000)
    mean = float(np.mean(a - 0.2 - b))
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=0.01)
    assert found.verdict == "better"
    assert compare_examples(b, a - 0.2).verdict == "worse"
    assert compare_examples(a, a + 1e-9 * b).verdict == "undecided"


def test_examples_that_all_differ_alike_need_no_interval():
    scores = np.arange(100.0)
    assert compare_examples(scores, scores).verdict == "undecided"
    same = compare_examples(scores, scores + 1.0)
    assert (same.low, same.high, same.verdict) == (-1.0, -1.0, "better")


# How many independent networks


def test_the_equivalent_is_read_off_the_line_between_two_sizes():
    curve = [0.40, 0.30, 0.28]
    assert ensemble_equivalent(0.35, curve) == pytest.approx(1.5)
    assert ensemble_equivalent(0.29, curve) == pytest.approx(2.5)
    assert ensemble_equivalent(0.28, curve) == 3.0
    assert ensemble_equivalent(0.45, curve) == 1.0
    assert ensemble_equivalent(0.2, curve) == math.inf


# In words


def test_a_gain_that_is_sure_but_smaller_than_what_matters_is_not_worth_it():
    tiny = compare_paired([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.001, 2.002, 3.001, 4.002, 5.001, 6.002])
    assert in_words(tiny, "a", "b").startswith("Worth it here: a has 0.0015 nats less calibrated NLL than b")
    assert in_words(tiny, "a", "b", least=0.01).startswith("Not worth it here")


def test_what_is_worse_is_not_worth_it():
    worse = compare_paired([2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0, 1.5, 2.5, 4.0, 4.5, 5.0])
    assert in_words(worse, "a", "b", score="error", unit="points").startswith(
        "Not worth it here: a has 1.4167 points more error than b"
    )


def test_what_is_not_decided_says_what_it_would_take():
    random = np.random.default_rng(6)
    unsure = compare_paired(random.normal(size=6), random.normal(size=6))
    needed = pairs_needed(unsure)
    assert needed > 6
    assert f"about {needed} seeds would show a difference of this size" in in_words(unsure, "a", "b")
    few = compare_paired([1.0, 2.0, 3.0], [2.0, 3.5, 4.0])
    assert in_words(few, "a", "b").endswith("fewer than 6 seeds decide nothing, so train 6.")


def test_where_all_pairs_tie_there_is_nothing_to_show():
    tied = compare_paired([1.0] * 6, [1.0] * 6)
    assert (tied.p, tied.verdict, pairs_needed(tied)) == (1.0, "undecided", None)
    assert "there is no difference to show" in in_words(tied, "a", "b")


# Bad input


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], "two rows of the same pairs, got shapes (2,) and (1,)"),
        ([[1.0]], [[1.0]], "got shapes (1, 1) and (1, 1)"),
        ([1.0], [1.0], "a comparison needs two or more pairs, got 1"),
        ([1.0, math.nan], [1.0, 2.0], "got nan in a at position 1: leave that pair out of both"),
        ([1.0, 2.0], [math.inf, 2.0], "got inf in b at position 0"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(a, b, message):
    with pytest.raises(DataError) as refused:
        compare_paired(a, b)
    assert message in str(refused.value)


def test_few_examples_are_refused():
    with pytest.raises(DataError, match="needs 100 or more, got 99: compare several seeds"):
        compare_examples(range(99), [0] * 99)


@pytest.mark.parametrize(("score", "curve"), [(0.1, []), (0.1, [[0.1]]), (math.nan, [0.1]), (0.1, [math.inf])])
def test_a_curve_without_numbers_is_refused(score, curve):
    with pytest.raises(DataError):
        ensemble_equivalent(score, curve)


@pytest.mark.parametrize(
    ("lacking", "message"), [("scipy", r"pip install 'snapcore\[lab\]'"), ("scipy.stats", "None in")]
)
def test_without_scipy_it_says_what_to_install(monkeypatch, lacking, message):
    monkeypatch.setitem(sys.modules, lacking, None)
    monkeypatch.delattr(scipy, "stats", raising=False)
    monkeypatch.delitem(sys.modules, "snapcore.verdict")
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module("snapcore.verdict")


def test_above_twenty_thousand_examples_the_interval_is_students(monkeypatch):
    random = np.random.default_rng(7)
    a, b = random.normal(size=(2, 20_001))
    found = compare_examples(a, b)
    half = 1.960 * np.std(a - b, ddof=1) / math.sqrt(20_001)
    assert found.high - found.low == pytest.approx(2 * half, rel=1e-3)


def test_a_gain_that_is_sure_but_perhaps_too_small_is_not_decided():
    found = compare_paired([1.0] * 6, [1.005, 1.015, 1.008, 1.012, 1.006, 1.013])
    assert found.verdict == "better"
    said = in_words(found, "a", "b", least=0.0101)
    assert said.startswith("Not decided")
    assert "it is there, but 0.0101 is asked for" in said


def test_a_loss_that_is_not_sure_is_not_called_worse():
    """The interval leaves 0 out, the p is 0.0625: with six pairs the ends are interpolated between its steps."""
    unsure = compare_paired([1.0, 1.0, 1.0, 1.0, 1.0, -0.001], [0.0] * 6)
    assert (unsure.low > 0, unsure.p, unsure.verdict) == (True, 0.0625, "undecided")
    said = in_words(unsure, "a", "b", unit="")
    assert said.startswith("Not decided: a has 0.8332 more calibrated NLL than b")
    assert "about 7 seeds" in said
