"""The fastest strategy that agrees with the loop is kept, whatever else is tried."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore import DataError, ProtocolError
from snapcore.ensemble import Trial, tune
from snapcore.ensemble.tuning import deviation


class Machine:
    """Strategies that take as long as they are asked to, on a clock of their own."""

    def __init__(self, seconds, results=None):
        self.seconds, self.results, self.now, self.calls = seconds, results or {}, 0.0, []

    def run(self, name):
        self.calls.append(name)
        self.now += self.seconds[name]
        result = self.results.get(name, np.array([0.25, 0.75]))
        if isinstance(result, Exception):
            raise result
        return result

    def tune(self, **options):
        return tune(self.run, list(self.seconds), to_host=np.asarray, clock=lambda: self.now, **options)


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), st.integers(1, 6))
def test_the_fastest_is_chosen_and_the_first_of_those_that_take_as_long(seconds, rounds):
    report = Machine(seconds).tune(rounds=rounds)
    assert report.chosen == sorted(seconds, key=lambda name: (seconds[name], list(seconds).index(name)))[0]
    assert {name: trial.seconds for name, trial in report.items()} == seconds


def test_the_first_call_of_each_is_not_timed():
    machine = Machine({"loop": 100.0, "stacked": 200.0})
    run = machine.run

    def compiling_once(name):
        result = run(name)
        machine.seconds[name] = {"loop": 3.0, "stacked": 2.0}[name]
        return result

    machine.run = compiling_once
    assert machine.tune().to_dict() == {
        "loop": {"seconds": 3.0, "deviation": 0.0, "refused": None},
        "stacked": {"seconds": 2.0, "deviation": 0.0, "refused": None},
    }


def test_they_take_turns_and_every_second_round_walks_the_order_backwards():
    machine = Machine({"a": 1, "b": 1, "c": 1})
    machine.tune(rounds=4)
    assert "".join(machine.calls) == "abc" + "abc" + "cba" + "abc" + "cba"


def test_short_calls_are_timed_several_at_once():
    machine = Machine({"loop": 1 / 256, "stacked": 1 / 1024, "map": 1 / 64})
    report = machine.tune(rounds=1)
    assert "".join(name[0] for name in machine.calls) == "lsm" + 3 * "l" + 11 * "s" + "m"  # 10 ms of each
    assert {name: trial.seconds for name, trial in report.items()} == machine.seconds


def test_a_slow_strategy_is_not_measured_to_the_end():
    machine = Machine({"loop": 1 / 64, "stacked": 1 / 32, "map": 1.5 / 64})
    machine.tune(rounds=20)
    assert Counter(machine.calls) == {"loop": 1 + 20, "stacked": 1 + 5, "map": 1 + 20}


def test_it_is_measured_again_when_the_fastest_turns_out_to_be_slower():
    machine = Machine({"loop": 1 / 32, "stacked": 1 / 64})
    run = machine.run

    def slower_later(name):
        if machine.calls.count("stacked") == 6:
            machine.seconds["stacked"] = 1 / 16
        return run(name)

    machine.run = slower_later
    assert machine.tune().chosen == "loop"
    assert 1 + 5 < machine.calls.count("loop") < machine.calls.count("stacked")


@pytest.mark.parametrize(("rounds", "taken"), [(3, 3), (5, 5), (100, 5)])
def test_long_calls_get_the_first_rounds_and_no_more(rounds, taken):
    machine = Machine({"loop": 10.0, "stacked": 9.0})
    machine.tune(rounds=rounds)
    assert Counter(machine.calls) == {"loop": 1 + taken, "stacked": 1 + taken}


def test_no_round_begins_after_two_seconds():
    machine = Machine({"loop": 1 / 8, "stacked": 1 / 8})
    machine.tune(rounds=100)
    assert Counter(machine.calls) == {"loop": 1 + 8, "stacked": 1 + 8}


def test_one_lucky_sample_does_not_decide():
    machine = Machine({"loop": 2.0, "stacked": 1.5})
    run = machine.run

    def lucky_once(name):
        machine.seconds["loop"] = 0.5 if machine.calls.count("loop") == 2 else 2.0
        return run(name)

    machine.run = lucky_once
    report = machine.tune(rounds=5)
    assert (report.chosen, report["loop"].seconds) == ("stacked", 2.0)


@given(st.floats(0, 0.75), st.floats(0, 0.4), st.permutations(["loop", "stacked"]))
@example(1 / 128, 5 / 32, ["loop", "stacked"])  # it ends within a sample of the second
def test_a_burst_of_noise_does_not_change_the_choice(begin, lasts, order):
    """The two differ by 3 %; for up to two thirds of the samples, calls take ten times as long."""
    seconds = {"loop": 33 / 32768, "stacked": 32 / 32768}
    machine = Machine({name: seconds[name] for name in order})
    run = machine.run

    def disturbed(name):
        if begin <= machine.now < begin + lasts:
            machine.now += 9 * seconds[name]
        return run(name)

    machine.run = disturbed
    report = machine.tune()
    assert (report.chosen, {name: trial.seconds for name, trial in report.items()}) == ("stacked", seconds)


def test_one_slow_moment_does_not_decide():
    machine = Machine({"loop": 2.0, "stacked": 1.0})
    lasts = itertools.chain([0, 0, 0, 500.0], itertools.repeat(0))
    run = machine.run

    def disturbed(name):
        machine.now += next(lasts)
        return run(name)

    machine.run = disturbed
    report = machine.tune(rounds=3)
    assert (report.chosen, report["stacked"].seconds) == ("stacked", 1.0)


def test_a_strategy_that_gives_something_else_is_reported_and_not_chosen():
    machine = Machine({"loop": 9, "stacked": 1, "map": 5}, {"stacked": np.array([0.25, 0.7575])})
    report = machine.tune(rounds=2)
    assert report.chosen == "map"
    assert report["stacked"].deviation == pytest.approx(0.01)
    assert report["stacked"].refused == "it deviates by 0.01, more than 1e-06"
    assert machine.calls.count("stacked") == 1


def test_a_wider_tolerance_lets_it_pass():
    machine = Machine({"loop": 9, "stacked": 1}, {"stacked": np.array([0.25, 0.7575])})
    assert machine.tune(tolerance=0.02).chosen == "stacked"


@pytest.mark.parametrize("wrong", [np.array([0.25, np.nan]), np.array([0.25, np.inf]), np.array([[0.25, 0.75]])])
def test_other_shapes_and_values_that_are_not_finite_never_agree(wrong):
    assert Machine({"loop": 9, "stacked": 1}, {"stacked": wrong}).tune(tolerance=0.5).chosen == "loop"


def test_a_strategy_that_cannot_be_run_is_reported_with_its_reason():
    report = Machine({"loop": 9, "sharded": 1}, {"sharded": DataError("there is one device")}).tune()
    assert (report.chosen, report["sharded"]) == ("loop", Trial(refused="there is one device"))


def test_what_nobody_refused_on_purpose_is_raised():
    with pytest.raises(KeyError):
        Machine({"loop": 9, "stacked": 1}, {"stacked": KeyError("a bug")}).tune()
    with pytest.raises(ProtocolError):
        Machine({"loop": 9, "stacked": 1}, {"loop": ProtocolError("the reference itself")}).tune()


def test_no_rounds_are_refused():
    with pytest.raises(DataError, match="rounds must be at least 1, got 0"):
        Machine({"loop": 1}).tune(rounds=0)


def test_the_report_is_a_mapping_and_prints_as_a_table():
    machine = Machine({"loop": 0.002, "stacked": 0.001, "map": 1}, {"map": DataError("no")})
    report = machine.tune()
    assert (len(report), list(report)) == (3, ["loop", "stacked", "map"])
    assert str(report).splitlines() == [
        "loop: 2 ms, deviation 0",
        "stacked: 1 ms, deviation 0  <- kept",
        "map: refused, no",
    ]


def test_a_deviation_is_relative_to_the_largest_value():
    assert deviation(np.array([0.0, 4.5]), np.array([0.5, 4.0])) == 0.125
    assert deviation(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0
    assert deviation(np.array([0.5]), np.array([0.0])) == 0.5
    assert deviation(np.float16([1.0]), np.float16([2.0])) == 0.5
