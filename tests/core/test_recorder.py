"""A pushed run: what is taken, when, and what becomes of errors."""

import threading
import time
import warnings
from pathlib import Path

import pytest

from snapcore import (
    CosineCycles,
    CycleWarning,
    Program,
    ProtocolError,
    Restart,
    ScheduleError,
    Snapshot,
    Stop,
    StoreError,
    program,
)
from snapcore.store import SnapshotStore, read_point

from .training import SIXTY, Copied, Loop, counts, members_of, weights_of


@pytest.fixture
def loop(tmp_path):
    with Loop(tmp_path / "run") as loop:
        yield loop


def test_a_member_holds_the_weights_after_its_last_update_whatever_comes_later(loop):
    events = [event for _ in range(60) for event in loop.step()]
    assert events == [*(Snapshot(k, 20 * k, 20 * k, SIXTY(19), k - 1) for k in (1, 2, 3)), Stop("finished")]
    assert counts(loop) == [(20, 20), (40, 40), (60, 60)]
    assert SnapshotStore(loop.recorder.directory).stopped == "finished"


def test_weights_are_copied_only_when_a_snapshot_is_due(loop):
    for _ in range(39):
        loop.step()
    loop.step(0)
    assert loop.copies == 2  # with the rehearsal after the first update


def test_weights_are_copied_only_when_a_snapshot_or_a_resume_point_is_due(tmp_path):
    with Loop(tmp_path, resume_every=8) as loop:
        copies = []
        for _ in range(40):
            loop.step()
            copies.append(loop.copies)
    due = [8, 16, 20, 24, 32, 40]  # the last is a member's, and needs no other
    assert copies == [1 + sum(position <= step for position in due) for step in range(1, 41)]  # 1: the rehearsal


def test_a_restart_is_carried_out_in_the_loop_and_returned(tmp_path):
    with Loop(tmp_path, program("star", lr=0.2, steps=60, cycles=3)) as loop:
        for _ in range(2):
            assert loop.step(20)[1:] == (Restart("first", "reset"),)
            tensors, optimizer = loop.restored
            assert (int(tensors["updates"]), optimizer) == (20, "reset")


def test_an_update_too_many_is_refused_and_nothing_is_taken(loop):
    with pytest.raises(ProtocolError, match="late='take'"):
        loop.step(21)
    assert loop.recorder.cursor.step == 0
    assert counts(loop) == []


def test_an_update_after_the_end_is_refused(loop):
    for _ in range(3):
        loop.step(20)
    assert loop.step(0) == ()
    with pytest.raises(ProtocolError, match=r"the program stopped after 60 updates \(finished\), got 1 more"):
        loop.step()


@pytest.mark.parametrize("every", [0, -1])
def test_resume_points_less_than_an_update_apart_are_refused_and_leave_no_directory(tmp_path, every):
    with pytest.raises(ProtocolError, match=f"resume_every counts updates, 1 or more; got {every}"):
        Loop(tmp_path / "run", resume_every=every)
    assert list(tmp_path.iterdir()) == []


def test_a_late_snapshot_is_warned_of_and_recorded_as_late(loop):
    with pytest.warns(CycleWarning, match="member 1 was due after update 20 and is taken 3 updates late") as caught:
        loop.step(23, late="take")
    assert [one.filename for one in caught] == [__file__]
    loop.step(17)
    assert counts(loop) == [(23, 23), (40, 40)]
    members = SnapshotStore(loop.recorder.directory).members
    assert [(m.step, m.due, m.lr, m.cycle) for m in members] == [(23, 20, SIXTY(22), 0), (40, 40, SIXTY(39), 1)]


def test_a_snapshot_on_time_is_not_warned_of_even_where_late_ones_are_allowed(loop):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.step(20, late="take")


def test_metrics_of_a_loop_are_recorded(loop):
    loop.step(20, metrics=lambda snapshot: {"index": snapshot.index, "loss": 0.5})
    loop.step(20, metrics=lambda snapshot: None)
    loop.recorder.close()
    found = [member.metrics for member in SnapshotStore(loop.recorder.directory).members]
    assert found == [{"index": 1.0, "loss": 0.5}, None]


def test_finish_takes_an_unfinished_member_and_says_why(loop):
    loop.step(20)
    loop.step(7)
    unfinished = Snapshot(2, 27, 27, SIXTY(26), 1, unfinished=True)
    assert loop.recorder.finish("out of time") == (unfinished, Stop("out of time"))
    assert loop.recorder.finish("again") == ()
    assert loop.recorder.cursor.stopped == "out of time"
    assert counts(loop) == [(20, 20), (27, 27)]
    store = SnapshotStore(loop.recorder.directory)
    assert ([member.unfinished for member in store.members], store.stopped) == ([False, True], "out of time")
    assert not (loop.recorder.directory / "resume").exists()
    with pytest.raises(StoreError, match=r"a run that is out of time \(2 members\)"):
        Loop(loop.recorder.directory)


def test_finish_right_after_a_member_takes_no_other(loop):
    loop.step(20)
    assert loop.recorder.finish("enough") == (Stop("enough"),)
    assert counts(loop) == [(20, 20)]
    assert SnapshotStore(loop.recorder.directory).stopped == "enough"
    assert not (loop.recorder.directory / "resume").exists()


def test_an_error_of_the_loop_passes_through_and_keeps_the_members(tmp_path):
    def mine():
        with Loop(tmp_path) as loop:
            loop.step(20)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mine()
    assert [int(member["updates"]) for member in members_of(tmp_path)] == [20]


def test_closing_twice_is_closing_once(loop):
    loop.step(20)
    assert counts(loop) == counts(loop) == [(20, 20)]


# ------------------------------------------------------------------------------------------------ opening a directory


def test_members_without_a_program_are_not_overwritten(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        store.save(weights_of(0, 1), index=1, step=1, cycle=0, lr=0.1, framework="numpy")
    with pytest.raises(StoreError, match="holds an unfinished run of another program"):
        Loop(tmp_path)


def test_a_second_writer_is_refused_and_the_first_continues(tmp_path):
    with Loop(tmp_path) as first:
        for resume in (True, False):
            with pytest.raises(StoreError, match="is being written by another run"):
                Loop(tmp_path, resume=resume)
        first.step(20)
    assert len(members_of(tmp_path)) == 1


def test_a_program_that_cannot_be_leaves_no_directory(tmp_path):
    with pytest.raises(ScheduleError):
        Loop(tmp_path / "run", CosineCycles(0.2, 60, 0))
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_describing_the_run_frees_the_directory(tmp_path, monkeypatch):
    def describe(self, **kwargs):
        raise StoreError("read-only")

    with monkeypatch.context() as patched:
        patched.setattr(SnapshotStore, "describe", describe)
        with pytest.raises(StoreError, match="read-only"):
            Loop(tmp_path)
    Loop(Path(tmp_path)).recorder.close()


# ------------------------------------------------------------------------------------------------ a copy that fails


@pytest.mark.parametrize("resumable", [True, False])
def test_a_capture_that_raises_leaves_cursor_and_directory_as_they_were(tmp_path, monkeypatch, resumable):
    with Loop(tmp_path, resumable=resumable) as loop:
        loop.step(19)
        with monkeypatch.context() as patched:
            patched.setattr(loop, "dump" if resumable else "capture", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loop.step()
        assert loop.recorder.cursor.step == 19
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "snapcore.json"]
        assert loop.recorder.record(1) == (Snapshot(1, 20, 20, SIXTY(19), 0),)  # the update is recorded again
    assert counts(loop) == [(20, 20)]


def test_metrics_that_raise_leave_the_cursor_as_it_was(loop):
    with pytest.raises(ZeroDivisionError):
        loop.step(20, metrics=lambda snapshot: 1 / 0)
    assert loop.recorder.cursor.step == 0
    assert counts(loop) == []


def test_a_resume_point_that_cannot_be_copied_at_close_frees_the_directory_and_loses_no_member(tmp_path, monkeypatch):
    loop = Loop(tmp_path)
    release = threading.Event()
    put = loop.recorder.store.put
    monkeypatch.setattr(loop.recorder.store, "put", lambda *args, **kwargs: release.wait() and put(*args, **kwargs))
    loop.step(20)
    loop.step(5)
    monkeypatch.setattr(loop, "dump", lambda: (release.set(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        loop.recorder.close()
    assert len(members_of(tmp_path)) == 1  # it was waited for, and written before the lock was freed
    SnapshotStore(tmp_path, "w").close()


def test_a_dump_that_does_not_name_its_weights_is_refused(tmp_path, monkeypatch):
    with Loop(tmp_path) as loop:
        monkeypatch.setattr(loop, "dump", lambda: (Copied({"w": weights_of(0, 1)["w"]}), {}))
        with pytest.raises(ProtocolError, match=r"must name its weights weights/<name>.*got \['w'\]"):
            loop.step()
        monkeypatch.undo()
    assert members_of(tmp_path) == []


# ------------------------------------------------------------------------------------------------ a disk that refuses


def no_space(*args, **kwargs):
    raise StoreError("no space left")


@pytest.fixture
def full_disk(loop, monkeypatch):
    monkeypatch.setattr(loop.recorder.store, "put", no_space)
    return loop


def step_until_it_is_raised(loop):
    for _ in range(10_000):
        try:
            loop.step(0)
        except StoreError as error:
            assert "no space left" in str(error)  # noqa: PT017  it comes when the writer's thread gets to it
            return
        time.sleep(0.001)
    pytest.fail("the writer's error was never raised")


def test_a_member_that_cannot_be_written_is_raised_at_a_later_update(full_disk):
    full_disk.step(20)
    step_until_it_is_raised(full_disk)
    assert full_disk.recorder.cursor.step == 20


def test_after_a_write_that_failed_the_run_refuses_to_continue_and_starting_again_resumes(full_disk, monkeypatch):
    full_disk.step(20)
    step_until_it_is_raised(full_disk)
    for call in (full_disk.step, lambda: full_disk.recorder.finish("enough")):
        with pytest.raises(ProtocolError, match="could not be written, and this run cannot continue without it: start"):
            call()
    full_disk.recorder.close()
    monkeypatch.undo()
    with Loop(full_disk.recorder.directory) as again:
        assert again.recorder.start() == ()
        assert again.recorder.cursor.step == 0  # there was no point before
        again.step(20)
    assert counts(again) == [(20, 20)]


def test_the_error_itself_is_raised_even_where_the_failure_is_seen_first(loop, monkeypatch):
    loop.step(20)
    loop.recorder.position()  # it is on disk
    seen = threading.Event()

    def fails_slowly():
        loop.recorder._saving.failed = True  # what the job does first, before the writer keeps its error
        seen.wait()
        no_space()

    loop.recorder._saving._writer.submit(fails_slowly)
    while not loop.recorder.failed:
        time.sleep(0.001)
    threading.Timer(0.01, seen.set).start()
    with pytest.raises(StoreError, match="no space left"):
        loop.step()
    with pytest.raises(ProtocolError, match="cannot continue without it"):
        loop.step()


def test_nothing_is_written_after_a_member_that_could_not_be(tmp_path, monkeypatch):
    """A resume point or a manifest that counts a member which is not there could never be resumed."""
    loop, release = Loop(tmp_path, resume_every=5), threading.Event()
    loop.step(19)
    monkeypatch.setattr(loop.recorder.store, "put", lambda *args, **kwargs: release.wait() and no_space())
    loop.step()  # the member's job runs, and waits
    loop.step(7)  # a point's job waits for it
    release.set()
    with pytest.raises(StoreError, match="no space left"):
        loop.recorder.close()
    assert (read_point(tmp_path).state["place"]["step"], members_of(tmp_path)) == (19, [])
    monkeypatch.undo()
    with Loop(tmp_path) as again:
        again.recorder.start()
        assert again.updates == again.recorder.cursor.step == 19
        again.step()
    assert counts(again) == [(20, 20)]


def test_a_member_that_cannot_be_written_is_raised_at_close_which_frees_the_directory(full_disk):
    full_disk.step(20)
    with pytest.raises(StoreError, match="no space left"):
        full_disk.recorder.close()
    SnapshotStore(full_disk.recorder.directory, "w").close()


def test_a_first_member_that_cannot_be_written_is_raised_by_the_restart_that_needs_it(tmp_path, monkeypatch):
    with Loop(tmp_path, program("star", lr=0.2, steps=60, cycles=3)) as loop:
        monkeypatch.setattr(loop.recorder.store, "put", no_space)
        with pytest.raises(StoreError, match="no space left"):
            loop.step(20)


def test_a_program_of_fresh_weights_is_refused_where_nothing_gives_them_and_leaves_no_directory(tmp_path):
    with pytest.raises(ProtocolError, match="singlecycle starts members from fresh weights: pass init="):
        Loop(tmp_path / "run", program("singlecycle", lr=0.2, steps=60, cycles=3))
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_last_member_could_not_be_written_is_not_called_finished(loop, monkeypatch):
    loop.step(20)
    loop.step(20)
    loop.recorder.position()  # both are on disk
    monkeypatch.setattr(loop.recorder.store, "put", no_space)
    loop.step(20)
    with pytest.raises(StoreError, match="no space left"):
        loop.recorder.close()
    store = SnapshotStore(loop.recorder.directory)
    assert (len(store.members), store.stopped) == (2, None)


def test_a_schedule_alone_is_a_program_of_its_snapshots(tmp_path):
    with Loop(tmp_path) as loop:
        assert loop.recorder.program == Program("snapshot", SIXTY)
