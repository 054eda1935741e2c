"""SIGTERM in the middle of a run: a resume point, no member, exit code 143."""

import logging
import os
import signal
import threading

import pytest

from snapcore import CosineCycles, Program, Restart, StoreError, program
from snapcore.store import SnapshotStore, read_point

from .training import (
    Loop,
    NumpyBackend,
    assert_same,
    counts,
    managed,
    members_of,
    pushed,
    simulate,
    undisturbed,
)

STAR = Program("star", CosineCycles(0.2, 9, 3), Restart("first", "reset"))


@pytest.fixture(autouse=True)
def earlier():
    """A handler of the program's own; what it was called with."""
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    handler = signal.getsignal(signal.SIGTERM)
    yield called
    assert signal.getsignal(signal.SIGTERM) is handler  # whatever happened, it is back
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def terminated(call):
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 143


@pytest.mark.parametrize("update", range(9))
def test_terminated_in_any_update_a_run_has_the_members_of_one_never_stopped(tmp_path, earlier, update):
    def before(step):
        if step == update:
            terminate()

    terminated(lambda: pushed(tmp_path, STAR, before=before))
    assert earlier == [signal.SIGTERM]
    if update < 8:
        assert read_point(tmp_path).state["place"]["step"] == update + 1
        assert len(members_of(tmp_path)) == (update + 1) // 3  # no other was taken
        pushed(tmp_path, STAR)
    assert_same(members_of(tmp_path), undisturbed(STAR))
    assert SnapshotStore(tmp_path).stopped == "finished"


def test_terminated_a_managed_run_resumes_where_its_native_loop_came_back(tmp_path):
    plan = program("singlecycle", lr=0.2, steps=60, cycles=3)
    terminated(lambda: managed(tmp_path, plan, report=lambda step, loss: step == 27 and terminate(), resume_every=10))
    assert read_point(tmp_path).state["place"]["step"] == 30
    backend = NumpyBackend()
    managed(tmp_path, plan, backend)
    assert next(entry for entry in backend.log if entry[0] == "train") == ("train", 30, 40)
    assert_same(members_of(tmp_path), simulate(plan, 0))


def test_the_signal_is_answered_after_the_update_that_follows_it(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with Loop(tmp_path) as loop:
        loop.step(9)
        terminate()
        assert loop.step(0) == ()  # micro-batches between two updates
        terminated(loop.step)
    assert caplog.messages == [f"{tmp_path}: left after 10 of 60 updates; it resumes after update 10"]
    SnapshotStore(tmp_path, "w").close()


def test_a_loop_may_ask_whether_the_next_update_is_its_last(tmp_path):
    with Loop(tmp_path) as loop:
        assert not loop.recorder.asked_to_stop
        terminate()
        assert loop.recorder.asked_to_stop
        terminated(loop.step)


def test_where_a_point_was_just_written_there_is_no_other(tmp_path):
    with Loop(tmp_path, resume_every=5) as loop:
        loop.step(4)
        terminate()
        terminated(loop.step)
    assert loop.copies == 2  # the rehearsal, and the point


def test_what_cannot_be_resumed_is_ended_without_a_point(tmp_path, caplog):
    with Loop(tmp_path, resumable=False) as loop:
        terminate()
        terminated(loop.step)
    assert caplog.messages == [f"{tmp_path}: left after 1 of 60 updates; there is no resume point"]


def test_the_handler_before_is_called_once_and_may_end_the_program_its_own_way(tmp_path):
    def ends(number, frame):
        raise KeyboardInterrupt

    original = signal.signal(signal.SIGTERM, ends)
    with Loop(tmp_path) as loop:
        terminate()
        with pytest.raises(KeyboardInterrupt):
            loop.step()
    signal.signal(signal.SIGTERM, original)
    assert read_point(tmp_path).state["place"]["step"] == 1


def test_without_a_handler_before_the_program_exits(tmp_path):
    original = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with Loop(tmp_path) as loop:
        terminate()
        terminated(loop.step)
    assert signal.signal(signal.SIGTERM, original) == signal.SIG_DFL


def test_a_second_signal_goes_to_the_handler_before(tmp_path, earlier):
    with Loop(tmp_path) as loop:
        terminate()
        assert earlier == []
        terminate()
        assert earlier == [signal.SIGTERM]
        terminated(loop.step)


def test_a_signal_in_the_last_update_ends_the_program_once_the_run_is_finished(tmp_path, earlier):
    with Loop(tmp_path) as loop:
        for n in (20, 20, 19):
            loop.step(n)
        terminate()
        terminated(loop.step)
    assert counts(loop) == [(20, 20), (40, 40), (60, 60)]
    assert SnapshotStore(tmp_path).stopped == "finished"
    assert not (tmp_path / "resume").exists()


def test_a_signal_after_the_last_update_is_the_programs_own(tmp_path, earlier):
    with Loop(tmp_path) as loop:
        for _ in range(3):
            loop.step(20)
        terminate()
        assert earlier == [signal.SIGTERM]
    assert counts(loop) == [(20, 20), (40, 40), (60, 60)]


def test_a_signal_before_finish_ends_the_program_when_the_run_is_closed(tmp_path):
    loop = Loop(tmp_path)
    loop.step(7)
    terminate()
    loop.recorder.finish("enough")
    terminated(loop.recorder.close)
    assert [member.unfinished for member in SnapshotStore(tmp_path).members] == [True]


def test_a_signal_that_no_update_answered_ends_the_program_when_the_block_is_left(tmp_path, earlier):
    """A loop that breaks while it validates must not swallow what would have ended the program."""

    def leave():
        with Loop(tmp_path) as loop:
            loop.step(5)
            terminate()

    terminated(leave)
    assert earlier == [signal.SIGTERM]
    assert read_point(tmp_path).state["place"]["step"] == 5


def test_an_error_on_its_way_is_not_replaced_by_the_exit(tmp_path):
    def fail():
        with Loop(tmp_path) as loop:
            loop.step(5)
            terminate()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def test_an_error_of_the_writer_is_raised_instead_of_the_exit(tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise StoreError("no space left")

    with Loop(tmp_path) as loop:
        loop.step(19)
        monkeypatch.setattr(loop.recorder.store, "put", no_space)
        terminate()
        with pytest.raises(StoreError, match="no space left"):
            loop.step()
    SnapshotStore(tmp_path, "w").close()


def test_in_a_thread_the_programs_handler_is_left_alone(tmp_path, earlier):
    handler, seen = signal.getsignal(signal.SIGTERM), []

    def train():
        with Loop(tmp_path) as loop:
            seen.append(signal.getsignal(signal.SIGTERM))
            for _ in range(3):
                loop.step(20)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [handler]
    assert len(members_of(tmp_path)) == 3


def test_a_refused_directory_leaves_the_handler_alone(tmp_path):
    with Loop(tmp_path):
        installed = signal.getsignal(signal.SIGTERM)
        with pytest.raises(StoreError):
            Loop(tmp_path)
        assert signal.getsignal(signal.SIGTERM) == installed


def test_two_runs_of_one_process_leave_at_one_step(tmp_path):
    def train():
        with Loop(tmp_path / "one") as one, Loop(tmp_path / "two") as two:
            for loop in (one, two, one):
                loop.step(4)
            terminate()
            two.step(3)
            one.step(2)

    terminated(train)
    assert [read_point(tmp_path / name).state["place"]["step"] for name in ("one", "two")] == [10, 7]


def test_a_run_that_has_just_written_its_point_writes_no_other_while_it_waits(tmp_path):
    copies = []

    def train():
        with Loop(tmp_path / "one", resume_every=5) as one, Loop(tmp_path / "two"):
            one.step(4)
            terminate()
            one.step()
            copies.append(one.copies)
            one.step()

    terminated(train)
    assert copies == [2]  # the rehearsal, and the point of update 5
    assert read_point(tmp_path / "one").state["place"]["step"] == 6


def test_ctrl_c_leaves_after_the_update_with_a_resume_point(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Loop(tmp_path) as loop:
        loop.step(4)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            loop.step()
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert read_point(tmp_path).state["place"]["step"] == 5
