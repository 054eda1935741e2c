"""The comparison itself, without a clock."""

from itertools import count

import pytest
from scipy.stats import binom

from .compare import Contender, Ratios, Row, format_table, interleaved, median_interval, rows, seconds


@pytest.mark.parametrize("n", [6, 15, 20, 21, 30, 101])
def test_interval_is_the_narrowest_pair_of_order_statistics_that_keeps_95_percent(n):
    _, low, high = median_interval(list(range(1, n + 1)))
    assert low + high == n + 1
    assert 1 - 2 * binom.cdf(low - 1, n, 0.5) >= 0.95
    assert 1 - 2 * binom.cdf(low, n, 0.5) < 0.95


def test_interval_of_too_few_values_is_everything():
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, float("-inf"), float("inf"))


def test_ratio_is_taken_within_pairs_so_that_drift_cancels():
    drift = [1.0, 2.0, 8.0, 4.0, 16.0, 3.0]
    ratios = Ratios([2 * d for d in drift], {"peer": drift})
    assert ratios.of("peer") == (2.0, 2.0, 2.0)


def test_contenders_take_turns_and_every_second_turn_walks_back():
    ticks, calls = count(), {"a": [], "b": [], "c": []}
    a, b, c = (Contender(lambda name=name: calls[name].append(next(ticks))) for name in calls)
    interleaved(a, {"b": b, "c": c}, pairs=4)
    order = _order(calls)
    assert order[:3] == "abc"
    assert order[3:6] == order[8:5:-1]
    assert order[9:12] == order[14:11:-1]


def test_no_turn_but_the_first_begins_once_the_time_is_used():
    calls = []
    ratios = interleaved(Contender(lambda: calls.append("a")), {"b": Contender(lambda: None)}, pairs=5, seconds=-1.0)
    assert len(ratios.ours) == len(ratios.peers["b"]) == 1
    assert calls == ["a", "a"]  # the turn that does not count, and the one that does


def test_preparation_is_done_before_every_sample_and_number_is_of_the_run_alone():
    calls = []
    Contender(lambda: calls.append("run"), lambda: calls.append("prepare"), number=2).sample()
    assert calls == ["prepare", "run", "run"]


def test_target_stands_beside_the_first_peer_only():
    lines = rows("x", Ratios([1.0], {"first": [2.0], "second": [4.0]}), "≤ 1")
    assert [line.target for line in lines] == ["≤ 1", "–"]
    assert [line.theirs for line in lines] == ["2 s", "4 s"]


@pytest.mark.parametrize(("value", "text"), [(1.5, "1.5 s"), (0.0021, "2.1 ms"), (3e-6, "3 µs"), (2.5e-8, "25 ns")])
def test_times_have_the_unit_that_suits_them(value, text):
    assert seconds(value) == text


def test_columns_of_the_table_are_aligned():
    lines = format_table([Row("a", "1 s"), Row("longer", "20 ms")])
    assert {line.index("|") for line in lines} == {len("comparison ")}


def _order(calls: dict[str, list[int]]) -> str:
    names = {tick: name for name, ticks in calls.items() for tick in ticks}
    return "".join(names[tick] for tick in sorted(names))
