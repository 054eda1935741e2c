"""Looks at an optimizer's count: as few as can be, and never one too late."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import CosineCycles, Cursor
from snapcore.counting import Calls


def walked(updates_by_call, every=None):
    """Walk a program by calls that do so many updates each; return where it looked, and what was due at each place."""
    cursor = Cursor(CosineCycles(lr=0.1, steps=600, cycles=3))
    calls, done, looks = Calls(cursor, (every, None)), 0, []
    for updates in updates_by_call:
        done += updates
        if done > 600:
            break
        due = calls.next_may_be_due()
        calls.add()
        if due:
            new = done - cursor.step
            events = cursor.advance(new, late="take")
            calls.settle(new)
            looks.append((done, bool(events)))
    return looks


def test_a_loop_of_one_update_a_call_looks_at_the_first_and_at_each_boundary():
    assert walked([1] * 600) == [(1, False), (200, True), (400, True), (600, True)]


def test_other_lengths_are_looked_at_too():
    assert walked([1] * 600, every=150) == [(step, step % 200 == 0) for step in (1, 150, 200, 300, 400, 450, 600)]


def test_calls_of_several_updates_are_known_after_the_first():
    assert walked([20] * 30) == [(20, False), (200, True), (400, True), (600, True)]


@pytest.mark.parametrize("accumulated", [2, 3, 8])
def test_micro_batches_are_looked_at_more_and_more_often_towards_a_boundary(accumulated):
    """Of n calls only the last does an update: looks come too early, and boundaries are met all the same."""
    looks = walked([int(call % accumulated == 0) for call in range(1, 600 * accumulated + 1)])
    assert [done for done, due in looks if due] == [200, 400, 600]
    assert len(looks) < 150


@given(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=1000))
def test_no_boundary_is_passed_unseen_while_calls_do_one_update_or_none(updates):
    done = sum(updates)
    assert [place for place, due in walked(updates) if due] == [due for due in (200, 400, 600) if due <= done]


def test_what_the_calls_did_at_most_can_be_asked_for():
    calls = Calls(Cursor(CosineCycles(lr=0.1, steps=600, cycles=3)))
    calls.add()
    calls.settle(7)
    calls.add()
    calls.add()
    assert (calls.waiting, calls.most) == (2, 14)
