"""The rate of every update and when snapshots are due, against equation 2 and a walk one update at a time."""

import copy
import itertools
import json
import math
import pickle
import random
import re
import warnings
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import CosineCycles, CycleWarning, ScheduleError, SnapcoreError, StepDecay, schedule_from_dict
from snapcore.schedule import Schedule

EXACT = SimpleNamespace(cos=np.vectorize(math.cos), where=np.where, minimum=np.minimum, mod=np.mod, real=np.float64)
NUMPY = SimpleNamespace(cos=np.cos, where=np.where, minimum=np.minimum, mod=np.mod, real=np.float64)
SINGLE = SimpleNamespace(cos=np.cos, where=np.where, minimum=np.minimum, mod=np.mod, real=np.float32)

rates = st.floats(1e-6, 10, allow_nan=False)
shares = st.floats(0, 1)


@st.composite
def cosines(draw, most=400):
    steps = draw(st.integers(1, most))
    warmup = draw(st.one_of(st.just(0), st.integers(0, steps - 1)))
    lr = draw(rates)
    return CosineCycles(
        lr,
        steps,
        draw(st.integers(1, steps - warmup)),
        lr_min=draw(st.one_of(st.just(0.0), shares.map(lambda share: share * lr))),
        warmup_steps=warmup,
        remainder=draw(st.sampled_from(["paper", "even"])),
    )


@st.composite
def decays(draw, most=400):
    steps = draw(st.integers(1, most))
    return StepDecay(
        draw(rates),
        steps,
        milestones=tuple(sorted(draw(st.lists(st.integers(0, 100).map(lambda n: n / 100), max_size=4)))),
        factor=draw(st.floats(0.01, 2)),
        snapshots=draw(st.integers(1, steps)),
    )


schedules = st.one_of(cosines(), decays())


def warnings_of(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(one.message) for one in caught if issubclass(one.category, CycleWarning)]


def lengths_in_words(steps, cycles, warmup, remainder):
    """Deal the updates out: full boxes of the ceiling, or one at a time to each cycle in turn."""
    updates = steps - warmup
    if remainder == "paper":
        box = -(-updates // cycles)
        return [min(box, updates - begin) for begin in range(0, updates, box)]
    return [sum(1 for update in range(updates) if update % cycles == cycle) for cycle in range(cycles)]


def rates_in_words(schedule):
    """Each cycle written out from its own first update, the warm-up before them."""
    updates = schedule.steps - schedule.warmup_steps
    span, rising = schedule.lr - schedule.lr_min, schedule.warmup_steps + 1
    climb = [schedule.lr * k / rising for k in range(1, rising)]
    lengths = lengths_in_words(schedule.steps, schedule.cycles, schedule.warmup_steps, schedule.remainder)
    periods = [-(-updates // schedule.cycles)] * len(lengths) if schedule.remainder == "paper" else lengths
    waves = [
        schedule.lr_min + span * math.cos(math.pi * k / (2 * period)) ** 2
        for length, period in zip(lengths, periods, strict=True)
        for k in range(length)
    ]
    return climb + waves


# ------------------------------------------------------------------------------------------------ equation 2


def test_two_thousand_random_rates_equal_the_formula_to_the_last_bit():
    draw = random.Random(20170424)
    for _ in range(2000):
        lr, steps = draw.uniform(1e-6, 10), draw.randint(1, 100_000)
        cycles = draw.randint(1, steps)
        schedule, length = CosineCycles(lr, steps, cycles), math.ceil(Fraction(steps, cycles))
        for t in {1, steps, *(draw.randint(1, steps) for _ in range(8))}:
            k = (t - 1) % length
            assert schedule.lr_at(t) == lr / 2 * (math.cos(math.pi * k / length) + 1), (lr, steps, cycles, t)


def test_twelve_updates_in_three_cycles_have_the_rates_of_equation_2():
    cycles = CosineCycles(lr=1.0, steps=12, cycles=3)
    assert [cycles.lr_at(t) for t in range(1, 13)] == pytest.approx([1, 0.853553, 0.5, 0.146447] * 3, abs=5e-7)


@given(st.integers(1, 60), st.integers(1, 20), rates)
def test_the_mean_rate_of_a_cycle_of_n_updates_is_half_the_peak_times_one_plus_one_nth(n, cycles, lr):
    schedule = CosineCycles(lr, n * cycles, cycles)
    assert sum(map(schedule, range(n))) / n == pytest.approx(lr / 2 * (1 + 1 / n))


@given(cosines())
def test_rates_are_the_warm_up_and_then_each_cycle_from_its_own_start(schedule):
    expected = rates_in_words(schedule)
    assert [schedule(step) for step in range(schedule.steps)] == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(schedules, st.integers(0, 10**9))
def test_past_the_end_the_last_rate_is_held(schedule, beyond):
    assert schedule(schedule.steps + beyond) == schedule(schedule.steps - 1)
    assert schedule.lr_at(schedule.steps) == schedule(schedule.steps - 1)


@given(cosines())
def test_a_rate_stays_between_the_floor_and_the_peak_once_warm(schedule):
    low = schedule.lr_min * (1 - 1e-12)
    warm = range(schedule.warmup_steps, schedule.steps)
    assert all(low <= schedule(step) <= schedule.lr * (1 + 1e-12) for step in warm)


# ------------------------------------------------------------------------------------------------ bind


@given(schedules)
def test_bound_to_numpy_it_gives_the_same_rates_and_clamps_outside(schedule):
    inside = [schedule(step) for step in range(schedule.steps)]
    first, last = inside[0], inside[-1]
    steps = np.arange(-3, schedule.steps + 3)
    assert list(schedule.bind(EXACT)(steps)) == [first] * 3 + inside + [last] * 3
    assert schedule.bind(NUMPY)(steps) == pytest.approx([first] * 3 + inside + [last] * 3, rel=1e-12)


@given(schedules)
def test_bound_without_clamping_it_gives_the_same_rates_inside_and_never_asks_for_a_minimum(schedule):
    bound = schedule.bind(SimpleNamespace(**{**vars(EXACT), "minimum": None}), clamped=False)
    assert list(bound(np.arange(schedule.steps))) == [schedule(step) for step in range(schedule.steps)]


@given(schedules)
def test_bound_to_numpy_it_takes_a_scalar_too(schedule):
    bound = schedule.bind(EXACT)
    assert all(float(bound(np.int64(step))) == schedule(step) for step in range(0, schedule.steps, 7))


@pytest.mark.parametrize("remainder", ["paper", "even"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_single_precision_counter_of_twenty_million_updates_stays_in_the_right_cycle(remainder, warmup):
    """float32 has no 20,000,001: the cycle must be found before the step becomes a real number."""
    schedule = CosineCycles(0.2, 24_000_000 + warmup, 24_000, warmup_steps=warmup, remainder=remainder)
    steps = np.array([19_999_999, 20_000_000, 20_000_001, 20_000_003, 20_000_999, 20_001_000], np.int32) + warmup
    exact = [0.1 * (math.cos(math.pi * k / 1000) + 1) for k in (999, 0, 1, 3, 999, 0)]
    found = schedule.bind(SINGLE)(steps.astype(np.int32))
    assert np.asarray(found) == pytest.approx(exact, abs=1e-7)


def test_a_single_precision_counter_finds_the_right_cycle_when_lengths_differ():
    schedule = CosineCycles(0.2, 30_000_500, 30_000, remainder="even")  # 500 cycles of 1001, the rest of 1000
    step = 500 * 1001 + 19_501 * 1000
    found = schedule.bind(SINGLE)(np.array([step - 1, step, step + 1], np.int32))
    assert np.asarray(found) == pytest.approx([0.1 * (math.cos(math.pi * k / 1000) + 1) for k in (999, 0, 1)], abs=1e-7)


def test_a_single_precision_counter_meets_a_milestone_exactly():
    decay = StepDecay(0.5, 40_000_002, milestones=(0.5,))
    found = decay.bind(SINGLE)(np.array([20_000_000, 20_000_001, 20_000_002], np.int32))
    assert found.tolist() == [0.5, 0.05, 0.05]


# ------------------------------------------------------------------------------------------------ cycles


@given(cosines())
def test_cycles_are_as_long_as_updates_dealt_out_by_hand(schedule):
    expected = lengths_in_words(schedule.steps, schedule.cycles, schedule.warmup_steps, schedule.remainder)
    assert list(schedule.cycle_lengths) == expected
    assert schedule.cycle_starts[0] == schedule.warmup_steps
    assert sum(schedule.cycle_lengths) == schedule.steps - schedule.warmup_steps
    assert schedule.snapshot_steps == tuple(itertools.accumulate(expected, initial=schedule.warmup_steps))[1:]


@given(cosines())
def test_even_cycles_differ_by_at_most_one_the_longer_ones_first(schedule):
    lengths = replace(schedule, remainder="even").cycle_lengths
    assert len(lengths) == schedule.cycles
    assert lengths == tuple(sorted(lengths, reverse=True))
    assert lengths[0] - lengths[-1] <= 1


@given(schedules, st.integers(0, 1000))
def test_cycle_at_counts_the_starts_that_have_passed(schedule, beyond):
    for step in [*range(schedule.steps), schedule.steps + beyond]:
        passed = sum(1 for start in schedule.cycle_starts if start <= step)
        assert schedule.cycle_at(step) == max(passed - 1, 0)
    assert schedule.cycle_at(schedule.steps + beyond) == len(schedule.snapshot_steps) - 1


@given(schedules)
def test_the_last_snapshot_is_due_at_the_last_update(schedule):
    """PyPI snapshot-ensemble saves 2 of 3: its last snapshot would be due after training ends."""
    assert schedule.snapshot_steps[-1] == schedule.steps
    assert list(schedule.snapshot_steps) == sorted(set(schedule.snapshot_steps))


@pytest.mark.parametrize("length", [2, 3, 7, 10, 49, 97])
@pytest.mark.parametrize("remainder", ["paper", "even"])
def test_the_rate_restarts_exactly_at_every_multiple_of_the_cycle(length, remainder):
    """torch CosineAnnealingWarmRestarts, timm and Keras find the cycle with floor(log(...)) and miss restarts."""
    schedule = CosineCycles(0.1, 5000 * length, 5000, remainder=remainder)
    first = [schedule(step) for step in range(length)]
    assert first[0] == 0.1
    assert first == sorted(first, reverse=True)
    assert all(schedule(step) == first[step % length] for step in range(schedule.steps))
    assert (schedule.bind(NUMPY)(np.arange(0, schedule.steps, length)) == 0.1).all()


# ------------------------------------------------------------------------------------------------ what peers get wrong


def test_the_authors_lua_code_would_take_the_last_of_eight_snapshots_at_77_percent_of_the_peak():
    """The authors' Lua code: its position in the last cycle is out of phase when M does not divide the epochs."""
    last_length = 300 - 7 * (300 // 8)
    lua = (1 + math.cos(math.pi * ((300 - 1) % last_length + 1) / last_length)) / 2
    assert lua == pytest.approx(0.77, abs=0.005)
    for remainder, at_most in (("paper", 0.05), ("even", 0.01)):
        schedule = CosineCycles(1.0, 300, 8, remainder=remainder)
        assert len(schedule.snapshot_steps) == 8
        assert all(schedule(step - 1) <= at_most for step in schedule.snapshot_steps)
        for start, length in zip(schedule.cycle_starts, schedule.cycle_lengths, strict=True):
            wave = [schedule(step) for step in range(start, start + length)]
            assert wave[0] == 1.0
            assert wave == sorted(set(wave), reverse=True)


def test_ten_updates_in_four_cycles_give_four_members():
    """titu1994 / keras-contrib floor the cycle: T=10, M=4 gives five files and never anneals."""
    with pytest.warns(CycleWarning, match="ends 100% above lr_min"):
        paper = CosineCycles(1.0, 10, 4)
    assert paper.snapshot_steps == (3, 6, 9, 10)
    even = CosineCycles(1.0, 10, 4, remainder="even")
    assert even.cycle_lengths == (3, 3, 2, 2)
    assert even(9) == pytest.approx(0.5)


def test_twenty_five_updates_in_ten_cycles_are_nine_and_the_warning_says_so():
    with pytest.warns(CycleWarning, match="does not fit 10 cycles: only 9 run, and the last, 1 of 3 updates") as caught:
        schedule = CosineCycles(0.2, 25, 10)
    assert schedule.cycle_lengths == (3,) * 8 + (1,)
    assert "remainder" not in str(caught[0].message)  # so few updates anneal under neither rule
    assert len(CosineCycles(0.2, 25, 10, remainder="even").cycle_lengths) == 10


def test_a_warm_up_does_not_shift_the_troughs():
    """One project saved at 37 % of the peak because warm-up was not counted."""
    with pytest.warns(CycleWarning, match="cycles of length 10, which end 2.4% above"):
        schedule = CosineCycles(0.3, 60, 5, warmup_steps=10)
    assert schedule.snapshot_steps == (20, 30, 40, 50, 60)
    assert schedule.cycle_starts == (10, 20, 30, 40, 50)
    trough = 0.3 * math.sin(math.pi / 20) ** 2
    assert [schedule(step - 1) for step in schedule.snapshot_steps] == pytest.approx([trough] * 5)
    assert [schedule(step) for step in range(11)] == pytest.approx([0.3 * k / 11 for k in range(1, 11)] + [0.3])
    assert [schedule.cycle_at(step) for step in (0, 9, 10, 19, 20)] == [0, 0, 0, 0, 1]


# ------------------------------------------------------------------------------------------------ the warning


def needs_a_warning(steps, cycles, floor=0.0, warmup=0, lr=1.0):
    """The rule in words: a cycle is missing, or the last rate is above the floor by more than 1 % of the span."""
    length = math.ceil((steps - warmup) / cycles)
    positions = [k % length for k in range(steps - warmup)]
    last = floor + (lr - floor) / 2 * (math.cos(math.pi * positions[-1] / length) + 1)
    return positions.count(0) < cycles or last > floor + 0.01 * (lr - floor)


@pytest.mark.parametrize(("floor", "warmup"), [(0.0, 0), (0.25, 0), (0.0, 7)])
def test_it_warns_just_when_a_cycle_is_missing_or_the_last_rate_is_high(floor, warmup):
    for steps in range(warmup + 1, 100):
        for cycles in range(1, steps - warmup + 1):
            said = warnings_of(lambda: CosineCycles(1.0, steps, cycles, lr_min=floor, warmup_steps=warmup))  # noqa: B023
            assert bool(said) == needs_a_warning(steps, cycles, floor, warmup), (steps, cycles, said)


@pytest.mark.parametrize("warmup", [0, 9])
def test_the_steps_it_names_fit_and_are_the_nearest(warmup):
    fits = {m: [t for t in range(warmup + m, 500) if not needs_a_warning(t, m, warmup=warmup)] for m in range(1, 16)}
    for cycles, steps in itertools.product(range(1, 16), range(warmup + 15, 260, 3)):
        for message in warnings_of(lambda: CosineCycles(0.1, steps, cycles, warmup_steps=warmup)):  # noqa: B023
            named = int(re.search(r"the nearest steps (?:that fit )?are (\d+)", message)[1])
            assert warnings_of(lambda: CosineCycles(0.1, named, cycles, warmup_steps=warmup)) == []  # noqa: B023
            assert abs(named - steps) == min(abs(t - steps) for t in fits[cycles]), (steps, cycles)


@given(st.integers(1, 15), st.integers(1, 12), st.integers(0, 9))
def test_whole_cycles_that_are_too_short_are_called_short_and_not_unfit(length, cycles, warmup):
    (message,) = warnings_of(lambda: CosineCycles(1.0, warmup + length * cycles, cycles, warmup_steps=warmup))
    left = 50 * (1 + math.cos(math.pi * (length - 1) / length))
    assert message == (
        f"steps={warmup + length * cycles} makes cycles of length {length}, which end {left:.1f}% above lr_min; "
        f"16 updates or more end within 1%: the nearest steps are {warmup + 16 * cycles}"
    )


@given(cosines())
def test_a_schedule_is_called_unfit_just_when_its_last_cycle_is_cut_short_or_one_is_missing(schedule):
    lengths = lengths_in_words(schedule.steps, schedule.cycles, schedule.warmup_steps, "paper")
    for message in warnings_of(lambda: replace(schedule, remainder="paper")):
        assert ("does not fit" in message) == (len(set(lengths)) > 1 or len(lengths) < schedule.cycles)
        assert ("cycles of length" in message) == ("does not fit" not in message)


@given(cosines())
def test_a_warning_is_one_line_of_at_most_thirty_words(schedule):
    for message in warnings_of(lambda: replace(schedule, remainder="paper")):
        assert "\n" not in message
        assert len(message.split()) <= 30


def test_it_advises_even_cycles_only_where_these_anneal():
    (message,) = warnings_of(lambda: CosineCycles(0.1, 300, 8))
    assert message.endswith('are 303, or pass remainder="even"')
    assert warnings_of(lambda: CosineCycles(0.1, 303, 8)) == []


@given(cosines())
def test_even_cycles_never_warn(schedule):
    assert warnings_of(lambda: replace(schedule, remainder="even")) == []


def test_a_constant_rate_warns_only_of_missing_cycles():
    assert warnings_of(lambda: CosineCycles(0.1, 10, 4, lr_min=0.1)) == []
    (message,) = warnings_of(lambda: CosineCycles(0.1, 25, 10, lr_min=0.1))
    assert "only 9 run, and the last, 1 of 3 updates, ends 0% above lr_min" in message


def test_the_warning_points_at_the_line_that_made_the_schedule():
    with pytest.warns(CycleWarning) as caught:
        CosineCycles(0.1, 10, 4)
    assert [one.filename for one in caught] == [__file__]


# ------------------------------------------------------------------------------------------------ step decay


def test_the_paper_s_baseline_drops_at_half_and_at_three_quarters():
    decay = StepDecay(lr=0.1, steps=300)
    assert [decay(step) for step in (0, 149, 150, 224, 225, 299)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert decay.snapshot_steps == (300,)
    assert StepDecay(0.1, 300, snapshots=6).snapshot_steps == (50, 100, 150, 200, 250, 300)


@given(st.integers(1, 3000), st.lists(st.integers(0, 1000), max_size=4).map(sorted), rates)
def test_a_rate_drops_at_the_ceiling_of_its_milestone_as_a_decimal_number(steps, thousandths, lr):
    decay = StepDecay(lr, steps, milestones=tuple(n / 1000 for n in thousandths), factor=0.5)
    for step in {0, steps // 2, steps - 1, *(n * steps // 1000 for n in thousandths)} & set(range(steps)):
        passed = sum(1 for n in thousandths if step >= math.ceil(Fraction(n, 1000) * steps))
        assert decay(step) == lr * 0.5**passed


@given(st.integers(1, 10**7), st.data())
def test_decay_snapshots_are_due_at_ceilings_of_integers(steps, data):
    snapshots = data.draw(st.integers(1, min(steps, 200)))
    decay = StepDecay(0.1, steps, snapshots=snapshots)
    due = [math.ceil(Fraction(k * steps, snapshots)) for k in range(1, snapshots + 1)]
    assert list(decay.snapshot_steps) == due
    assert decay.cycle_starts == (0, *due[:-1])
    assert sum(decay.cycle_lengths) == steps


def test_without_milestones_the_rate_is_constant():
    decay = StepDecay(0.1, 5, milestones=[])
    assert [decay(step) for step in range(5)] == [0.1] * 5
    assert decay.bind(NUMPY)(np.arange(5)).tolist() == [0.1] * 5


# ------------------------------------------------------------------------------------------------ a value


@given(schedules)
def test_it_comes_back_from_json_pickle_and_copies_without_a_warning(schedule):
    schedule(0)  # evaluated once, it holds a function that cannot be pickled
    text = json.dumps(schedule.to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins = [
            schedule_from_dict(json.loads(text)),
            pickle.loads(pickle.dumps(schedule)),
            copy.copy(schedule),
            copy.deepcopy(schedule),
        ]
    for twin in twins:
        assert twin == schedule
        assert type(twin) is type(schedule)
        assert hash(twin) == hash(schedule)
        assert [twin(step) for step in range(0, schedule.steps, 5)] == [
            schedule(step) for step in range(0, schedule.steps, 5)
        ]
        assert twin.snapshot_steps == schedule.snapshot_steps
    assert len({schedule, *twins}) == 1


def test_it_cannot_be_changed():
    for schedule in (CosineCycles(0.1, 32, 2), StepDecay(0.1, 32)):
        with pytest.raises(FrozenInstanceError):
            schedule.lr = 0.2


def test_schedules_that_differ_are_not_equal():
    base = CosineCycles(0.1, 64, 2)
    others = [
        CosineCycles(0.2, 64, 2),
        CosineCycles(0.1, 65, 2),
        CosineCycles(0.1, 64, 3),
        CosineCycles(0.1, 64, 2, lr_min=0.01),
        CosineCycles(0.1, 64, 2, warmup_steps=1),
        CosineCycles(0.1, 64, 2, remainder="even"),
        StepDecay(0.1, 64, snapshots=2),
    ]
    assert base not in others
    assert len({base, *others}) == 8


def test_numpy_s_numbers_become_python_s():
    schedule = CosineCycles(np.float32(0.5), np.int64(64), np.int8(4), lr_min=np.float64(0), warmup_steps=np.uint8(0))
    assert schedule == CosineCycles(0.5, 64, 4)
    assert json.dumps(schedule.to_dict()) == json.dumps(CosineCycles(0.5, 64, 4).to_dict())
    assert schedule(np.int32(3)) == schedule(3)


def test_a_base_schedule_leaves_its_formula_to_a_subclass():
    bare, shapeless = Schedule(), object.__new__(CosineCycles.__base__)
    for ask in (
        lambda: bare._formula(NUMPY),
        lambda: bare.cycle_at(0),
        lambda: bare.cycle_starts,
        lambda: shapeless._above(NUMPY, 1.0),
    ):
        with pytest.raises(NotImplementedError):
            ask()


# ------------------------------------------------------------------------------------------------ refusals

NAN, INF = math.nan, math.inf
BAD_COSINES = [
    ({"cycles": 0}, "cycles must be in 1..steps=5, got 0"),
    ({"cycles": 6}, "cycles must be in 1..steps=5, got 6"),
    ({"cycles": 4, "warmup_steps": 2}, "cycles must be in 1..steps-warmup_steps=3, got 4"),
    ({"cycles": -1}, "got -1"),
    ({"cycles": 2.0}, "cycles must be an integer, got 2.0"),
    ({"steps": 0}, "steps must be 1 or more, got 0"),
    ({"steps": -5}, "steps must be 1 or more"),
    ({"steps": 5.0}, "steps must be an integer, got 5.0"),
    ({"steps": "5"}, "steps must be an integer, got '5'"),
    ({"steps": None}, "steps must be an integer, got None"),
    ({"steps": 2**53 + 1}, "steps must be at most 9007199254740992, got 9007199254740993"),
    ({"steps": 10**400}, "steps must be at most"),
    ({"lr": 0}, "lr must be above 0"),
    ({"lr": -0.1}, "lr must be finite and not negative, got -0.1"),
    ({"lr": NAN}, "lr must be finite"),
    ({"lr": INF}, "lr must be finite"),
    ({"lr": 10**400}, "lr must be a number"),
    ({"lr": "fast"}, "lr must be a number, got 'fast'"),
    ({"lr": None}, "lr must be a number"),
    ({"lr_min": -0.1}, "lr_min must be finite and not negative"),
    ({"lr_min": NAN}, "lr_min must be finite"),
    ({"lr_min": 0.2}, "lr_min must be in 0..lr=0.1, got 0.2"),
    ({"warmup_steps": 5}, "warmup_steps must be in 0..steps-1=4, got 5"),
    ({"warmup_steps": -1}, "warmup_steps must be in 0"),
    ({"warmup_steps": 0.5}, "warmup_steps must be an integer"),
    ({"remainder": "floor"}, "remainder must be one of"),
    ({"remainder": None}, "remainder must be one of"),
]
BAD_DECAYS = [
    ({"lr": 0}, "lr must be above 0"),
    ({"lr": NAN}, "lr must be finite"),
    ({"steps": 0}, "steps must be 1 or more"),
    ({"steps": 2.5}, "steps must be an integer"),
    ({"snapshots": 0}, "snapshots must be in 1..steps=8, got 0"),
    ({"snapshots": 9}, "snapshots must be in 1..steps=8, got 9"),
    ({"snapshots": 1.0}, "snapshots must be an integer"),
    ({"milestones": (0.5,) * 1001}, "milestones must be at most 1000, got 1001"),
    ({"milestones": (0.5,) * 4, "factor": 1e300}, "lr=0.1 · factor=1e+300 ** 4 milestones must be finite"),
    ({"lr": 1e300, "milestones": (0.5,), "factor": 1e10}, "must be finite"),
    ({"factor": 0}, "factor must be above 0"),
    ({"factor": -1}, "factor must be finite and not negative"),
    ({"factor": INF}, "factor must be finite"),
    ({"milestones": (0.75, 0.5)}, "not descending"),
    ({"milestones": (0.5, 1.5)}, "shares in 0..1"),
    ({"milestones": (-0.1,)}, "milestones must be finite and not negative"),
    ({"milestones": (NAN,)}, "milestones must be finite"),
    ({"milestones": ("half",)}, "milestones must be a number"),
    ({"milestones": 0.5}, "milestones must be shares in 0..1, got 0.5"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_COSINES, ids=str)
def test_values_that_describe_no_cosine_cycles_are_refused(bad, message):
    with pytest.raises(ScheduleError, match=re.escape(message)):
        CosineCycles(**{"lr": 0.1, "steps": 5, "cycles": 1, **bad})


@pytest.mark.parametrize(("bad", "message"), BAD_DECAYS, ids=str)
def test_values_that_describe_no_step_decay_are_refused(bad, message):
    with pytest.raises(ScheduleError, match=re.escape(message)):
        StepDecay(**{"lr": 0.1, "steps": 8, **bad})


@pytest.mark.parametrize("schedule", [CosineCycles(0.1, 32, 2), StepDecay(0.1, 32)])
def test_steps_that_cannot_be_are_refused(schedule):
    for ask in (schedule, schedule.cycle_at):
        with pytest.raises(ScheduleError, match="step counts the updates done, 0 or more, got -1"):
            ask(-1)
        with pytest.raises(ScheduleError, match=r"step must be an integer, got 1\.5"):
            ask(1.5)
    with pytest.raises(ScheduleError, match="got -1"):
        schedule.lr_at(0)
    with pytest.raises(ScheduleError, match=r"t must be an integer, got 1\.0"):
        schedule.lr_at(1.0)


def test_a_schedule_error_is_a_value_error_and_a_snapcore_error():
    assert issubclass(ScheduleError, ValueError)
    assert issubclass(ScheduleError, SnapcoreError)
    assert issubclass(CycleWarning, UserWarning)


GOOD = CosineCycles(0.1, 32, 2).to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "kind must be one of ['CosineCycles', 'Cycles', 'StepDecay'], got None"),
        ({**GOOD, "kind": "Schedule"}, "got 'Schedule'"),
        ({**GOOD, "kind": ["CosineCycles"]}, "kind must be one of"),
        ({**GOOD, "kind": "StepDecay"}, "StepDecay takes"),
        ({**GOOD, "extra": 1}, "CosineCycles takes"),
        ({name: value for name, value in GOOD.items() if name != "lr"}, "CosineCycles takes"),
        ({**GOOD, "lr": -1}, "lr must be finite and not negative"),
        ({**GOOD, "cycles": 33}, "cycles must be in 1..steps=32, got 33"),
        ({**GOOD, "remainder": ["paper"]}, "remainder must be one of"),
        ({**StepDecay(0.1, 4).to_dict(), "milestones": 0.5}, "milestones must be shares"),
    ],
    ids=str,
)
def test_a_dict_that_describes_no_schedule_is_refused(values, message):
    with pytest.raises(ScheduleError, match=re.escape(message)):
        schedule_from_dict(values)


def test_the_dict_of_a_schedule_is_plain_and_complete():
    assert CosineCycles(0.2, 60, 5, warmup_steps=10).to_dict() == {
        "kind": "CosineCycles",
        "lr": 0.2,
        "steps": 60,
        "cycles": 5,
        "lr_min": 0.0,
        "warmup_steps": 10,
        "remainder": "paper",
    }
    assert StepDecay(0.1, 4).to_dict() == {
        "kind": "StepDecay",
        "lr": 0.1,
        "steps": 4,
        "milestones": [0.5, 0.75],
        "factor": 0.1,
        "snapshots": 1,
    }


def test_restarts_restart_without_another_option():
    """In fastai cycle_mult=1 divides by zero; in transformers one cycle is the default, and restarts do not restart."""
    cycles = CosineCycles(0.1, 90, 3)
    assert [step for step in range(90) if cycles(step) == 0.1] == [0, 30, 60]


@pytest.mark.parametrize(
    "schedule",
    [CosineCycles(lr=0.1, steps=10**9, cycles=10**6 + 1, remainder="even"), StepDecay(0.1, 10**9, snapshots=10**6 + 1)],
)
def test_more_snapshots_than_a_run_keeps_are_refused_in_a_file_alone(schedule):
    assert schedule(5) > 0
    with pytest.raises(ScheduleError, match="kept with at most 1000000 snapshots, got 1000001"):
        schedule.to_dict()
    values = {**schedule.__getstate__(), "kind": type(schedule).__name__}
    with pytest.raises(ScheduleError, match="kept with at most 1000000 snapshots, got 1000001"):
        schedule_from_dict(values)
