"""Looks at an optimizer's count: as few as can be, never one too late, and one at the end."""

import linecache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import CosineCycles, Cursor, CycleWarning, DivergedError, ProtocolError
from snapcore.run import Calls, Ending, FollowedLoader
from snapcore.store import SnapshotStore, read_point

from .training import Loop


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


class CountedLoop(Loop):
    """A loop whose weight is its optimizer's count: `step` looks at it only where something may be due."""

    def __init__(self, directory, **options):
        super().__init__(directory, **options)
        self.calls = Calls(self.recorder.cursor)
        self.ending = Ending(self.recorder, self.calls, self.look)
        self.looks = 0

    def update(self, n=1):
        self.weights["updates"] += n

    def step(self):
        due = self.calls.next_may_be_due()
        self.calls.add()
        self.recorder.epochs.settle()
        if due:
            self.look()

    def look(self):
        self.looks += 1
        new = self.updates - self.recorder.cursor.step
        self.recorder.record(new, late="take")
        self.calls.settle(new)

    def walk(self, updates):
        for _ in range(updates):
            self.update()
            self.step()


@pytest.fixture
def loop(tmp_path):
    loop = CountedLoop(tmp_path)
    yield loop
    loop.recorder.close()


def told(caplog):
    return [record.getMessage().split(": ", 1)[1] for record in caplog.records]


@pytest.mark.parametrize(("calls", "more"), [(27, 0), (27, 1), (20, 1), (20, 0)])
def test_a_run_that_is_closed_goes_on_from_where_its_loop_was(loop, tmp_path, calls, more, caplog):
    loop.walk(calls)
    assert loop.recorder.cursor.step == 20
    loop.update(more)
    loop.ending.close(exact=True)
    place = calls + more
    assert (loop.recorder.cursor.step, read_point(tmp_path).state["place"]["step"]) == (place, place)
    assert told(caplog) == [f"left after {place} of 60 updates; it goes on after update {place}"]


def test_a_run_that_is_closed_as_it_may_not_go_on_tells_how_far_its_calls_came(loop, tmp_path, caplog):
    loop.walk(27)
    looks = loop.looks
    loop.ending.close(exact=False)
    assert (loop.looks, read_point(tmp_path).state["place"]["step"]) == (looks, 20)
    assert told(caplog) == ["left after 27 of 60 updates; it goes on after update 20"]


@pytest.mark.parametrize("first", [True, False])
def test_closing_twice_is_closing_once_though_updates_come_in_between(loop, tmp_path, first, caplog):
    loop.walk(27)
    loop.ending.close(exact=first)
    loop.update(20)
    looks = loop.looks
    for exact in (True, False):
        loop.ending.close(exact=exact)
    assert (loop.looks, loop.recorder.cursor.step, len(told(caplog))) == (looks, 27, 1)
    assert [member.step for member in SnapshotStore(tmp_path).members] == [20]


def test_an_end_that_cannot_be_looked_at_frees_the_directory_and_leaves_the_resume_point_before(loop, tmp_path):
    loop.walk(27)
    loop.weights["updates"] -= 20
    with pytest.raises(ProtocolError, match="got -13"):
        loop.ending.close(exact=True)
    assert loop.ending.reached
    loop.ending.close(exact=True)
    with SnapshotStore(tmp_path, "w") as store:
        assert [member.step for member in store.members] == [20]
    assert read_point(tmp_path).state["place"]["step"] == 20


def test_finishing_takes_an_unfinished_member_of_all_that_was_done(loop, tmp_path):
    loop.walk(27)
    loop.ending.finish("out of time")
    loop.update()
    with pytest.raises(ProtocolError, match="stopped after 27 updates"):
        loop.step()
    loop.ending.close(exact=True)
    members = SnapshotStore(tmp_path).members
    assert [(member.step, member.unfinished) for member in members] == [(20, False), (27, True)]
    assert SnapshotStore(tmp_path).load(2)["updates"] == 27


@pytest.mark.parametrize("exact", [True, False])
def test_the_end_is_reached_with_the_program_and_updates_after_it_are_not_looked_at(loop, tmp_path, exact):
    loop.walk(59)
    assert not loop.ending.reached
    loop.walk(1)
    assert loop.ending.reached
    loop.update()
    loop.ending.finish("enough")
    loop.ending.close(exact=exact)
    assert (loop.recorder.cursor.step, SnapshotStore(tmp_path).stopped) == (60, "finished")


def test_a_boundary_that_is_only_seen_at_the_end_is_taken_late_and_warned_of_at_the_loops_line(loop, tmp_path):
    loop.walk(19)
    loop.update(4)
    with pytest.warns(CycleWarning, match=r"3 updates late.*one call of run.step\(\), or of its callback") as caught:
        loop.ending.close(exact=True)
    (line,) = (linecache.getline(one.filename, one.lineno).strip() for one in caught)
    assert line == "loop.ending.close(exact=True)"
    assert [member.step for member in SnapshotStore(tmp_path).members] == [23]


@pytest.mark.parametrize(("last", "used"), [("taken", 5), ("updated", 6)])
def test_the_last_batch_is_given_again_unless_an_update_was_made_of_it(loop, tmp_path, last, used):
    for place, _ in enumerate(loop.recorder.batches(range(9)), 1):
        if place == 6:
            break
        loop.walk(1)
    if last == "updated":
        loop.update()
    loop.ending.close(exact=True)
    state = read_point(tmp_path).state
    assert (state["place"]["step"], state["processes"][0]["data"]["batches"]) == (used, used)


def test_an_error_of_the_writer_is_told_once(tmp_path):
    loop = CountedLoop(tmp_path, resumable=False)
    loop.weights["updates"] = np.array(np.nan)
    loop.recorder.record(20)
    with pytest.raises(DivergedError, match="member 1 at update 20"):
        loop.ending.close(exact=False)
    loop.ending.close(exact=True)


def test_closing_after_a_step_has_told_of_the_error_tells_nothing_more(tmp_path):
    """As `try: …, finally: run.close()` does: another error would stand before the one to read."""
    loop = CountedLoop(tmp_path, resumable=False)
    loop.weights["updates"] = np.array(np.nan)
    loop.recorder.record(20)
    with pytest.raises(DivergedError, match="member 1 at update 20"):
        loop.recorder.place()
    loop.calls.add()
    loop.ending.close(exact=True)
    assert not loop.looks


def test_a_loader_that_is_followed_gives_the_same_and_tells_of_its_end():
    seen = []

    class Loader(list):
        sampler = object()

    loader = FollowedLoader(Loader("ab"), lambda: seen.append("end"))
    for _ in range(2):
        seen += loader
    assert seen == ["a", "b", "end", "a", "b", "end"]
    assert loader.sampler is Loader.sampler
    assert FollowedLoader("ab", seen.clear).sampler is None
