"""Programs and the cursor that walks them, against lists written out by hand and a shadow cursor."""

import itertools
import json
import pickle
import re
import warnings
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from snapcore import (
    METHODS,
    CosineCycles,
    Cursor,
    CycleWarning,
    Program,
    ProtocolError,
    Restart,
    ScheduleError,
    SnapcoreError,
    Snapshot,
    StepDecay,
    Stop,
    Train,
    program,
    program_from_dict,
)
from snapcore.protocol import as_program

BETWEEN = [Restart(*words) for words in itertools.product(("previous", "first", "fresh"), ("keep", "reset"))]
SIXTY = CosineCycles(0.2, 60, 3)  # members after 20, 40 and 60 updates


@st.composite
def programs(draw, most=60):
    steps = draw(st.integers(1, most))
    warmup = draw(st.integers(0, steps - 1))
    cosine = CosineCycles(
        0.2,
        steps,
        draw(st.integers(1, min(steps - warmup, 9))),
        warmup_steps=warmup,
        remainder=draw(st.sampled_from(["paper", "even"])),
    )
    decay = StepDecay(0.1, steps, snapshots=draw(st.integers(1, min(steps, 9))))
    return Program("mine", draw(st.sampled_from([cosine, decay])), draw(st.sampled_from(BETWEEN)))


def listed(plan):
    """The instructions written from the boundaries alone, without a cursor."""
    due, found = plan.schedule.snapshot_steps, []
    for index, (start, stop) in enumerate(zip((0, *due), due, strict=False), 1):
        found.append(Train(start, stop))
        found.append(Snapshot(index, stop, stop, plan.schedule(stop - 1), index - 1))
        if stop != due[-1] and plan.between != Restart("previous", "keep"):
            found.append(plan.between)
    return [*found, Stop("finished")]


def events_of(plan):
    return [instruction for instruction in listed(plan) if not isinstance(instruction, Train)]


def walk(cursor, jumps):
    found = []
    for jump in jumps:
        if cursor.finished:
            break
        found += cursor.advance(min(jump, cursor.until_next))
    while not cursor.finished:
        found += cursor.advance(cursor.until_next)
    return found


# ------------------------------------------------------------------------------------------------ programs

T, M = 192, 6  # six cycles of 32 updates; the step schedule drops at 96 and 144
COSINE_TROUGHS = [32, 64, 96, 128, 160, 192]


@pytest.mark.parametrize(
    ("method", "troughs", "between", "cost"),
    [
        ("single", [192], None, T),
        ("cosine", [192], None, T),
        ("nocycle", COSINE_TROUGHS, None, T),
        ("snapshot", COSINE_TROUGHS, None, T),
        ("singlecycle", COSINE_TROUGHS, Restart("fresh", "reset"), T),
        ("independent", [192, 384, 576, 768, 960, 1152], Restart("fresh", "reset"), M * T),
        ("star", COSINE_TROUGHS, Restart("first", "reset"), T),
    ],
)
def test_each_method_is_its_row_of_the_table(method, troughs, between, cost):
    plan = program(method, lr=0.2, steps=T, cycles=M)
    assert plan.method == method
    assert [one.step for one in plan if isinstance(one, Snapshot)] == troughs
    restarts = [one for one in plan if isinstance(one, Restart)]
    assert restarts == ([between] * (len(troughs) - 1) if between else [])
    assert plan.updates == cost
    assert sum(one.stop - one.start for one in plan if isinstance(one, Train)) == cost
    rates = [plan.schedule(step) for step in range(0, cost, 16)]
    if method in ("single", "nocycle"):
        assert rates == pytest.approx([0.2] * 6 + [0.02] * 3 + [0.002] * 3)
    elif method == "cosine":
        assert rates[0] == 0.2
        assert rates == sorted(set(rates), reverse=True)
    else:
        assert rates == pytest.approx([0.2, 0.1] * M if method != "independent" else rates[:12] * M)
        assert [plan.schedule(step) for step in (0, *troughs[:-1])] == [0.2] * M


def test_the_methods_are_seven():
    assert METHODS == ("single", "cosine", "nocycle", "snapshot", "singlecycle", "independent", "star")


def test_all_methods_but_the_independent_one_cost_the_same():
    costs = {method: program(method, lr=0.1, steps=600, cycles=6).updates for method in METHODS}
    assert costs.pop("independent") == 3600
    assert set(costs.values()) == {600}


def test_independent_members_go_each_through_one_full_cosine():
    plan = program("independent", lr=0.2, steps=100, cycles=3)
    one = program("cosine", lr=0.2, steps=100, cycles=3).schedule
    assert [plan.schedule(step) for step in range(300)] == [one(step) for step in range(100)] * 3


def test_options_go_to_the_schedule():
    assert program("snapshot", lr=0.1, steps=70, cycles=3, warmup_steps=10, lr_min=0.01, remainder="even") == Program(
        "snapshot", CosineCycles(0.1, 70, 3, warmup_steps=10, lr_min=0.01, remainder="even")
    )
    assert program("nocycle", lr=0.1, steps=70, cycles=3, snapshots=3).schedule.snapshot_steps == (24, 47, 70)
    assert program("single", lr=0.1, steps=70, cycles=3, milestones=(0.1,)).schedule(7) == pytest.approx(0.01)


@given(programs())
def test_a_program_lists_its_instructions_and_knows_how_many(plan):
    expected = listed(plan)
    assert list(plan) == expected
    assert len(plan) == len(expected)
    assert [plan[index] for index in range(-len(expected), len(expected))] == expected * 2
    assert list(plan[1:-1:2]) == expected[1:-1:2]
    assert list(reversed(plan)) == expected[::-1]
    with pytest.raises(IndexError):
        plan[len(expected)]


@given(programs())
def test_no_instruction_does_nothing(plan):
    assert all(one.start < one.stop for one in plan if isinstance(one, Train))
    assert Restart("previous", "keep") not in list(plan)


@given(programs())
def test_a_program_comes_back_from_json_and_pickle_without_a_warning(plan):
    text = json.dumps(plan.to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins = [program_from_dict(json.loads(text)), pickle.loads(pickle.dumps(plan))]
    assert all(twin == plan and hash(twin) == hash(plan) and list(twin) == list(plan) for twin in twins)


def test_programs_that_differ_are_not_equal():
    plans = [program(method, lr=0.1, steps=600, cycles=6) for method in METHODS]
    assert len({*plans, Program("snapshot", SIXTY), Program("mine", SIXTY), Program("mine", SIXTY, BETWEEN[1])}) == 10


def test_a_schedule_alone_means_its_snapshots_and_nothing_in_between():
    assert as_program(SIXTY) == Program("snapshot", SIXTY, Restart("previous", "keep"))
    plan = Program("mine", SIXTY, Restart("first", "reset"))
    assert as_program(plan) is plan
    assert Cursor(SIXTY).program == as_program(SIXTY)


@pytest.mark.parametrize("other", [0.1, "snapshot", CosineCycles, None])
def test_what_is_neither_a_schedule_nor_a_program_is_refused(other):
    with pytest.raises(ProtocolError, match=r"a schedule, such as .*, or a program from snapcore\.program; got "):
        as_program(other)


def test_instructions_cannot_be_changed():
    for instruction in program("star", lr=0.2, steps=60, cycles=2):
        for field in fields(instruction):
            with pytest.raises(FrozenInstanceError):
                setattr(instruction, field.name, 1)


@pytest.mark.parametrize("words", [("last", "keep"), ("first", "zero"), ("", ""), (None, "keep"), (["first"], "keep")])
def test_a_restart_in_other_words_is_refused(words):
    with pytest.raises(ProtocolError, match=r"(source|optimizer) must be one of \("):
        Restart(*words)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ProtocolError, match=r"method must be one of single, cosine, .*, star; got 'fge'"):
        program("fge", lr=0.1, steps=10, cycles=2)


@pytest.mark.parametrize("method", ["snapshot", "independent", "singlecycle", "cosine", "single"])
def test_values_that_describe_no_schedule_are_refused_by_every_method(method):
    with pytest.raises(ScheduleError):
        program(method, lr=0.1, steps=60.0, cycles=2)
    with pytest.raises(ScheduleError):
        program(method, lr=0.0, steps=60, cycles=2)


GOOD = Program("mine", SIXTY, Restart("first", "reset")).to_dict()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ProtocolError, "a program has a method and the objects schedule and between, got {}"),
        ({**GOOD, "extra": 1}, ProtocolError, "'extra': 'int'"),
        ({**GOOD, "schedule": None}, ProtocolError, "got {'method': 'str', 'schedule': 'NoneType', 'between': 'dict'}"),
        ({**GOOD, "between": "keep"}, ProtocolError, "'between': 'str'"),
        ({**GOOD, "between": {"source": "first"}}, ProtocolError, "between has the names source and optimizer"),
        ({**GOOD, "between": {**GOOD["between"], "source": "x"}}, ProtocolError, "source must be one of"),
        ({**GOOD, "schedule": {}}, ScheduleError, "kind must be one of"),
    ],
    ids=str,
)
def test_a_dict_that_describes_no_program_is_refused(values, error, message):
    with pytest.raises(error, match=re.escape(message)):
        program_from_dict(values)


def test_a_protocol_error_is_a_runtime_error_and_a_snapcore_error():
    assert issubclass(ProtocolError, RuntimeError)
    assert issubclass(ProtocolError, SnapcoreError)


# ------------------------------------------------------------------------------------------------ the cursor


@given(programs(), st.lists(st.integers(0, 30)))
def test_walked_one_by_one_or_in_jumps_it_yields_what_the_program_lists(plan, jumps):
    assert walk(Cursor(plan), [1] * plan.updates) == events_of(plan)
    assert walk(Cursor(plan), jumps) == events_of(plan)


@given(programs(), st.integers(0, 60))
def test_its_rate_is_the_schedule_s_at_its_step(plan, updates):
    cursor = Cursor(plan)
    for _ in range(min(updates, plan.updates)):
        assert cursor.lr == plan.schedule(cursor.step)
        cursor.advance()
    assert cursor.lr == plan.schedule(cursor.step)


def test_members_are_taken_at_the_end_of_a_cycle_at_its_lowest_rate():
    """torch-uncertainty collects at the start of a cycle: the weights there were trained at the peak."""
    taken = [event for event in walk(Cursor(SIXTY), []) if isinstance(event, Snapshot)]
    assert [event.step for event in taken] == [20, 40, 60]
    assert [event.lr for event in taken] == [SIXTY(19)] * 3
    assert all(event.lr == min(map(SIXTY, range(60))) for event in taken)


def test_the_last_snapshot_is_taken_when_training_ends_on_it():
    """PyPI snapshot-ensemble never saves its last snapshot (2 of 3)."""
    cursor = Cursor(SIXTY)
    found = [event for _ in range(60) for event in cursor.advance()]
    assert found[-2:] == [Snapshot(3, 60, 60, SIXTY(59), 2), Stop("finished")]
    assert cursor.taken == 3
    assert (cursor.finished, cursor.stopped, cursor.until_next) == (True, "finished", 0)


def test_an_advance_past_a_boundary_is_refused_and_names_it():
    cursor = Cursor(SIXTY)
    cursor.advance(15)
    before = cursor.state_dict()
    with pytest.raises(ProtocolError, match=r"due after update 20, but 6 updates .* from 15 to 21.*until_next=5"):
        cursor.advance(6)
    assert cursor.state_dict() == before
    assert cursor.until_next == 5
    assert cursor.advance(5) == (Snapshot(1, 20, 20, SIXTY(19), 0),)


@pytest.mark.parametrize("n", [-1, 1.0, "1", None, [1]])
def test_updates_are_whole_numbers_not_below_zero(n):
    cursor = Cursor(SIXTY)
    cursor.advance(3)
    before = cursor.state_dict()
    for late in ("raise", "take"):
        with pytest.raises(ProtocolError, match="n counts updates"):
            cursor.advance(n, late=late)
    assert cursor.state_dict() == before


def test_updates_may_be_numpy_s_integers_and_stay_python_s():
    cursor = Cursor(SIXTY)
    assert cursor.advance(np.int64(7)) == ()
    assert type(cursor.step) is int
    assert cursor.state_dict()["step"] == 7


def test_no_update_is_nothing_also_right_after_a_member_and_at_the_end():
    cursor = Cursor(SIXTY)
    for _ in range(3):
        cursor.advance(20)
        before = cursor.state_dict()
        assert cursor.advance(0) == ()
        assert cursor.state_dict() == before


@given(programs())
def test_it_is_at_a_member_just_after_the_updates_that_end_a_cycle(plan):
    cursor, at = Cursor(plan), []
    for _ in range(plan.updates):
        at += [cursor.step] if cursor.at_member else []
        cursor.advance()
    assert cursor.at_member
    assert (*at, cursor.step) == plan.schedule.snapshot_steps


def test_after_the_stop_an_update_is_refused():
    cursor = Cursor(SIXTY)
    walk(cursor, [])
    before = cursor.state_dict()
    for late in ("raise", "take"):
        with pytest.raises(ProtocolError, match=r"stopped after 60 updates \(finished\), got 2 more"):
            cursor.advance(2, late=late)
    assert cursor.state_dict() == before


def test_a_late_snapshot_has_the_true_step_and_the_trough_it_was_due_at():
    cursor = Cursor(SIXTY)
    assert cursor.advance(23, late="take") == (Snapshot(1, 23, 20, SIXTY(22), 0),)
    assert cursor.until_next == 17
    assert cursor.advance(17, late="take") == (Snapshot(2, 40, 40, SIXTY(39), 1),)


def test_a_late_snapshot_past_several_troughs_is_one_and_due_at_the_newest():
    cursor = Cursor(Program("mine", SIXTY, Restart("fresh", "reset")))
    assert cursor.advance(45, late="take") == (Snapshot(1, 45, 40, SIXTY(44), 1), Restart("fresh", "reset"))
    assert cursor.advance(15) == (Snapshot(2, 60, 60, SIXTY(59), 2), Stop("finished"))


def test_a_late_snapshot_past_the_end_is_the_last_and_stops():
    cursor = Cursor(SIXTY)
    assert cursor.advance(70, late="take") == (Snapshot(1, 70, 60, SIXTY(59), 2), Stop("finished"))
    assert cursor.step == 70
    again = Cursor(SIXTY)
    again.load_state_dict(cursor.state_dict())
    assert again.finished


def test_finishing_early_takes_an_unfinished_member_and_stops():
    cursor = Cursor(SIXTY)
    cursor.advance(20)
    cursor.advance(7)
    assert cursor.finish("out of time") == (Snapshot(2, 27, 27, SIXTY(26), 1, unfinished=True), Stop("out of time"))
    assert (cursor.finished, cursor.stopped) == (True, "out of time")


@pytest.mark.parametrize("steps", [0, 20])
def test_finishing_right_after_a_member_or_before_any_update_takes_none(steps):
    cursor = Cursor(SIXTY)
    cursor.advance(steps)
    assert cursor.finish("enough") == (Stop("enough"),)
    with pytest.raises(ProtocolError, match="enough"):
        cursor.advance()


def test_finishing_what_is_finished_changes_nothing():
    cursor = Cursor(SIXTY)
    walk(cursor, [])
    before = cursor.state_dict()
    assert cursor.finish("again") == ()
    assert cursor.state_dict() == before


@given(programs(), st.data())
def test_from_any_position_the_remaining_events_are_those_of_the_run_never_stopped(plan, data):
    done = data.draw(st.integers(0, plan.updates))
    cursor, found = Cursor(plan), []
    for _ in range(done):
        found += cursor.advance()
    resumed = Cursor(plan)
    resumed.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    assert resumed.step == done
    assert found + walk(resumed, []) == events_of(plan)


BAD_POSITIONS = {
    "empty": {},
    "no count": {"step": None},
    "a real number": {"step": 25.0},
    "text": {"taken": "1"},
    "a flag": {"taken": True},
    "negative step": {"step": -1, "taken": 0, "last": 0},
    "negative members": {"taken": -1},
    "negative last": {"last": -1},
    "last after step": {"last": 26},
    "more members than boundaries": {"taken": 2},
    "no member at the boundary passed": {"taken": 0, "last": 0},
    "a member missing": {"step": 45},
    "members but none taken": {"last": 0},
    "past the end, not stopped": {"step": 60, "taken": 3, "last": 60},
    "stopped, not on a member": {"stopped": "finished"},
    "no reason": {"stopped": 1},
}


@pytest.mark.parametrize("change", BAD_POSITIONS.values(), ids=BAD_POSITIONS)
def test_a_state_that_is_no_position_in_the_program_is_refused_and_changes_nothing(change):
    cursor = Cursor(SIXTY)
    cursor.advance(5)
    before = cursor.state_dict()
    state = {"step": 25, "taken": 1, "last": 20, "stopped": None, **change} if change else {}
    with pytest.raises(ProtocolError, match=r"state must be a position in a program of 60 updates, got \{"):
        cursor.load_state_dict(state)
    assert cursor.state_dict() == before
    assert cursor.until_next == 15


def test_the_position_of_a_longer_program_is_refused():
    longer, cursor = Cursor(CosineCycles(0.2, 600, 3)), Cursor(SIXTY)
    longer.advance(30)
    with pytest.raises(ProtocolError, match="must be a position"):
        cursor.load_state_dict(longer.state_dict())


class CursorWalk(RuleBasedStateMachine):
    """A cursor beside a shadow that knows only the boundaries, the step and how many members it has."""

    @initialize(plan=programs())
    def begin(self, plan):
        self.plan, self.cursor = plan, Cursor(plan)
        self.step = self.taken = self.last = 0
        self.reason = None

    def boundaries_within(self, step):
        return [due for due in self.plan.schedule.snapshot_steps if self.step < due <= step]

    def expect(self, step):
        passed, self.step = self.boundaries_within(step), step
        if not passed:
            return ()
        self.taken, self.last = self.taken + 1, step
        cycle = self.plan.schedule.snapshot_steps.index(passed[-1])
        snapshot = Snapshot(self.taken, step, passed[-1], self.plan.schedule(step - 1), cycle)
        if passed[-1] == self.plan.updates:
            self.reason = "finished"
            return snapshot, Stop("finished")
        return (snapshot,) if self.plan.between == Restart("previous", "keep") else (snapshot, self.plan.between)

    @precondition(lambda self: self.reason is None)
    @rule(share=st.floats(0, 1))
    def advance_within_the_cycle(self, share):
        n = round(share * self.cursor.until_next)
        assert self.cursor.advance(n) == self.expect(self.step + n)

    @precondition(lambda self: self.reason is None)
    @rule(beyond=st.integers(0, 20))
    def advance_late(self, beyond):
        n = self.cursor.until_next + beyond
        assert self.cursor.advance(n, late="take") == self.expect(self.step + n)

    @rule(beyond=st.integers(1, 20))
    def advance_too_far(self, beyond):
        before = self.cursor.state_dict()
        with pytest.raises(ProtocolError):
            self.cursor.advance(self.cursor.until_next + beyond)
        assert self.cursor.state_dict() == before

    @rule()
    def resume(self):
        state = json.loads(json.dumps(self.cursor.state_dict()))
        self.cursor = Cursor(program_from_dict(self.plan.to_dict()))
        self.cursor.load_state_dict(state)
        assert self.cursor.state_dict() == state

    @precondition(lambda self: self.step > self.plan.updates // 2)
    @rule()
    def finish(self):
        expected = ()
        if self.reason is None:
            expected = (Stop("enough"),)
            if self.step > self.last:
                cycle = sum(1 for due in self.plan.schedule.snapshot_steps if due <= self.step)
                rate = self.plan.schedule(self.step - 1)
                expected = (Snapshot(self.taken + 1, self.step, self.step, rate, cycle, unfinished=True), *expected)
                self.taken, self.last = self.taken + 1, self.step
            self.reason = "enough"
        assert self.cursor.finish("enough") == expected

    @invariant()
    def the_position_is_the_shadow_s(self):
        if not hasattr(self, "cursor"):
            return
        nexts = [due for due in self.plan.schedule.snapshot_steps if due > self.step]
        assert (self.cursor.step, self.cursor.taken, self.cursor.stopped) == (self.step, self.taken, self.reason)
        assert self.cursor.finished == (self.reason is not None)
        assert self.cursor.lr == self.plan.schedule(self.step)
        assert self.cursor.until_next == (0 if self.reason else nexts[0] - self.step)


TestCursorBesideItsShadow = CursorWalk.TestCase
TestCursorBesideItsShadow.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_cursor_never_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cursor = Cursor(program_from_dict({**GOOD, "schedule": CosineCycles(0.1, 64, 4).to_dict()}))
        walk(cursor, [])
    with pytest.warns(CycleWarning):
        program("snapshot", lr=0.1, steps=10, cycles=4)
