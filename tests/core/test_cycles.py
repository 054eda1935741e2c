"""Cycles of any shape: the paper's general form, over every framework's operations."""

import itertools
import math
import pickle
import warnings
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import snapcore.schedule
from snapcore import CosineCycles, Cycles, CycleWarning, ScheduleError, register_shape, schedule_from_dict
from snapcore.run import Recorder

from .training import Training

NUMPY = SimpleNamespace(cos=np.cos, where=np.where, minimum=np.minimum, mod=np.mod, real=np.float64)


def halved(u, ops):
    """Down to a half in the first half of a cycle, and to 0 in the second."""
    return ops.where(u < 0.5, 1 - u, 1 - u)


def quiet(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CycleWarning)
        return make()


@st.composite
def layouts(draw):
    warmup, cycles = draw(st.integers(0, 9)), draw(st.integers(1, 7))
    return {
        "lr": draw(st.floats(1e-3, 2.0)),
        "steps": warmup + draw(st.integers(cycles, 200)),
        "cycles": cycles,
        "lr_min": draw(st.sampled_from([0.0, 1e-4])),
        "warmup_steps": warmup,
        "remainder": draw(st.sampled_from(["paper", "even"])),
    }


@given(layouts())
def test_a_cosine_is_cosine_cycles_to_the_last_bit(layout):
    mine, known = quiet(lambda: Cycles("cosine", **layout)), quiet(lambda: CosineCycles(**layout))
    assert [mine(step) for step in range(mine.steps)] == [known(step) for step in range(known.steps)]
    assert mine.snapshot_steps == known.snapshot_steps
    steps = np.arange(mine.steps)
    assert np.array_equal(mine.bind(NUMPY)(steps), known.bind(NUMPY)(steps))


@given(layouts())
def test_linear_rates_are_those_of_exact_fractions(layout):
    schedule = quiet(lambda: Cycles("linear", **layout))
    for start, length in zip(schedule.cycle_starts, schedule.cycle_lengths, strict=True):
        whole = schedule.cycle_lengths[0] if schedule.remainder == "paper" else length
        floor, span = Fraction(schedule.lr_min), Fraction(schedule.lr - schedule.lr_min)
        for k in range(length):
            exact = float(floor + span * (1 - Fraction(k, whole)))
            assert math.isclose(schedule(start + k), exact, rel_tol=1e-12)


def test_an_exponential_cycle_falls_by_equal_shares_of_what_is_above_its_shifted_end():
    schedule = Cycles("exponential", 1.0, 2000, 2)
    above = [schedule(k) + 0.01 / 0.99 for k in range(1000)]
    shares = [b / a for a, b in itertools.pairwise(above)]
    assert max(shares) - min(shares) < 1e-12
    assert math.isclose(shares[0] ** 1000, 0.01, rel_tol=1e-9)
    assert schedule(0) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("shape", ["cosine", "linear", "exponential", halved])
def test_bound_to_numpy_it_gives_the_same_rates(shape):
    schedule = quiet(lambda: Cycles(shape, 0.2, 107, 4, warmup_steps=5, lr_min=1e-3, remainder="even"))
    steps = np.arange(107)
    rates = schedule.bind(NUMPY)(steps)
    np.testing.assert_allclose(rates, [schedule(int(step)) for step in steps], rtol=1e-13)


def test_a_function_that_uses_the_operations_is_evaluated_with_pythons():
    schedule = Cycles(lambda u, ops: (ops.cos(math.pi * u) + 1) / 2, 0.2, 300, 6)
    assert schedule(25) == pytest.approx(CosineCycles(0.2, 300, 6)(25), rel=1e-15)


# What is said at the start


def test_a_linear_cycle_is_called_short_under_a_hundred_updates_and_the_steps_named_fit():
    with pytest.warns(CycleWarning, match="100 updates or more end within 1%: the nearest steps are 200"):
        Cycles("linear", 0.1, 60, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cycles("linear", 0.1, 200, 2)


def test_the_warning_points_at_the_line_that_made_the_schedule():
    with pytest.warns(CycleWarning) as said:
        Cycles("linear", 0.1, 60, 2)
    assert said[0].filename == __file__


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("sine", "shape must be one of cosine, linear, exponential"),
        (3, "shape must be a name or a function f(u, ops), got 3"),
        (lambda u, ops: u, "shape must fall from 1 at u=0 to 0 at u=1, got 0 and 1"),
        (lambda u, ops: 2 * (1 - u), "got 2 and 0: scale it"),
        (lambda u, ops: abs(1 - 4 * u) if u < 1 else 0.0, "shape must not rise, got a rise after u=[0.25]"),
        (lambda u, ops: 1.0 if u < 1 else 0.0, "shape must come near 0 before u=1, got 1"),
        (lambda u, ops: math.nan, "shape must give a finite number, got nan at 0.0"),
        (lambda u, ops: None, "shape must be f(u, ops), over arithmetic and ops, and give a number"),
        (lambda u: 1 - u, "shape must be f(u, ops), over arithmetic and ops, and give a number"),
        (lambda u, ops: ops.exp(-u), "shape must be f(u, ops), over arithmetic and ops, and give a number"),
    ],
)
def test_what_is_no_decreasing_shape_is_refused(shape, message):
    with pytest.raises(ScheduleError) as refused:
        Cycles(shape, 0.1, 64, 2)
    assert message in str(refused.value)


# Kept


@pytest.mark.parametrize("shape", ["cosine", "linear", "exponential"])
def test_a_named_shape_comes_back_from_json_and_pickle(shape):
    schedule = quiet(lambda: Cycles(shape, 0.1, 64, 2, lr_min=1e-4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for copy in (schedule_from_dict(schedule.to_dict()), pickle.loads(pickle.dumps(schedule))):
            assert copy == schedule
            assert [copy(step) for step in range(64)] == [schedule(step) for step in range(64)]


def test_a_run_with_a_function_that_has_no_name_is_refused_when_it_begins(tmp_path):
    schedule = quiet(lambda: Cycles(halved, 0.1, 64, 2))
    with pytest.raises(ScheduleError, match=r"register_shape\('mine', f\)"):
        Recorder(tmp_path / "run", schedule, Training(), framework="numpy")
    assert not (tmp_path / "run" / "snapcore.json").exists()


def test_a_registered_function_is_found_by_its_name_and_kept():
    register_shape("halved", halved)
    register_shape("halved", halved)
    schedule = quiet(lambda: Cycles("halved", 0.1, 64, 2))
    assert schedule_from_dict(schedule.to_dict()) == schedule
    assert schedule(16) == 0.05


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(ScheduleError, match=f"shape '{name}' is taken"):
        register_shape(name, halved)


def test_what_is_no_function_is_not_registered():
    with pytest.raises(ScheduleError, match=r"shape must be a function f\(u, ops\), got 3"):
        register_shape("three", 3)


def test_a_run_kept_with_a_shape_that_is_not_registered_here_says_so():
    values = {**quiet(lambda: Cycles("linear", 0.1, 64, 2)).to_dict(), "shape": "unheard"}
    with pytest.raises(ScheduleError, match="register_shape gives yours a name in this process; got 'unheard'"):
        schedule_from_dict(values)


def test_unpickled_where_its_shape_has_no_such_name_it_says_so(monkeypatch):
    """As in a worker that was started anew."""
    register_shape("here alone", halved)
    kept = pickle.dumps(quiet(lambda: Cycles("here alone", 0.1, 64, 2)))
    monkeypatch.delitem(snapcore.schedule._SHAPES, "here alone")
    with pytest.raises(ScheduleError, match="register_shape gives yours a name in this process; got 'here alone'"):
        pickle.loads(kept)(0)


def test_numbers_of_numpy_are_numbers():
    assert Cycles(lambda u, ops: np.float32(1 - u), 0.1, 400, 2)(0) == pytest.approx(0.1)
