"""A run that was left and is opened again: where it resumes, what it says, and what it refuses."""

import contextlib
import logging
import shutil
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import CorruptSnapshotError, CosineCycles, DataError, Program, Restart, StoreError, program
from snapcore.store import SnapshotStore, read_point, seal, unseal

from .training import (
    RESTARTS,
    SIXTY,
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


class CrashedError(Exception):
    """Something in the loop."""


def at(update, *, crash):
    """Leave the loop of `pushed` there, by an error or by a break."""

    def leaves(step):
        if step == update and crash:
            raise CrashedError
        return step == update

    return leaves


def pushed_until_finished(directory, plan, leaves, **options):
    for update, crash in leaves:
        with contextlib.suppress(CrashedError):
            pushed(directory, plan, after=at(update, crash=crash), **options)
        if SnapshotStore(directory).stopped is not None:
            return
    pushed(directory, plan, **options)


@pytest.mark.parametrize("crash", [True, False])
@pytest.mark.parametrize("update", range(1, 9))
def test_left_after_any_update_a_run_has_the_members_of_one_never_stopped(tmp_path, update, crash):
    pushed_until_finished(tmp_path, STAR, [(update, crash)])
    assert_same(members_of(tmp_path), undisturbed(STAR))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 15),
    st.integers(1, 4),
    st.sampled_from(RESTARTS),
    st.sampled_from([None, 1, 2, 5]),
    st.lists(st.tuples(st.integers(1, 15), st.booleans()), max_size=4),
)
def test_left_again_and_again_a_run_has_the_members_of_one_never_stopped(steps, cycles, between, every, leaves):
    plan = Program("mine", CosineCycles(0.1, steps, min(cycles, steps), remainder="even"), between)
    with tempfile.TemporaryDirectory() as directory:
        pushed_until_finished(directory, plan, leaves, resume_every=every)
        assert_same(members_of(directory), undisturbed(plan))
        store = SnapshotStore(directory)
        assert [member.step for member in store.members] == list(plan.schedule.snapshot_steps)
        assert (store.program, store.stopped) == (plan.to_dict(), "finished")


def test_a_run_left_before_its_update_resumes_with_the_batch_that_it_had(tmp_path):
    """`for batch in run.batches(loader): if time_is_up(): break` comes before the update."""
    seen = []
    for until in (3, 8, 60):
        with Loop(tmp_path) as loop:
            loop.recorder.start()
            for batch in loop.recorder.batches(range(7)):
                if loop.updates == until:
                    break
                seen.append(batch)
                loop.step()
    assert seen == [update % 7 for update in range(60)]


@pytest.mark.parametrize("update", [13, 20, 33, 59])
def test_a_managed_run_that_fails_at_any_update_resumes_from_the_last_point(tmp_path, update):
    plan = program("star", lr=0.2, steps=60, cycles=3)

    def fails(step, loss):
        if step == update:
            raise CrashedError

    with pytest.raises(CrashedError):
        managed(tmp_path, plan, report=fails, resume_every=8)
    backend = NumpyBackend()
    managed(tmp_path, plan, backend)
    begun = max(step for step in (8, 16, 20, 24, 32, 40, 48, 56) if step < update)
    assert next(entry for entry in backend.log if entry[0] == "train")[1] == begun
    assert_same(members_of(tmp_path), simulate(plan, 0))


def test_the_restart_that_follows_a_member_is_done_by_the_run_that_resumes(tmp_path):
    plan = program("star", lr=0.2, steps=60, cycles=3)
    with Loop(tmp_path, plan) as loop:
        loop.step(20)
    with Loop(tmp_path, plan) as loop:
        assert loop.recorder.start() == (Restart("first", "reset"),)
        loop.step(3)
    with Loop(tmp_path, plan) as loop:
        assert loop.recorder.start() == ()


def test_where_nothing_happens_between_members_nothing_is_handed_back(tmp_path):
    with Loop(tmp_path) as loop:
        assert loop.recorder.start() == ()
        loop.step(20)
    with Loop(tmp_path) as loop:
        assert loop.recorder.start() == ()
        assert (loop.updates, loop.recorder.cursor.step) == (20, 20)


def test_a_point_at_a_member_refers_to_its_file_and_another_holds_the_weights(tmp_path):
    with Loop(tmp_path) as loop:
        loop.step(20)
        loop.recorder.position()
        point = read_point(tmp_path)
        assert (sorted(point.tensors), point.member) == ([], SnapshotStore(tmp_path).members[0])
        loop.step(5)
    point = read_point(tmp_path)
    assert (int(point.tensors["weights/updates"]), point.member) == (25, None)


def test_what_belongs_to_a_point_is_brought_up_to_date_before_every_one(tmp_path):
    called = []
    with Loop(tmp_path, resume_every=8, before_point=lambda: called.append(loop.updates)) as loop:
        for _ in range(27):
            loop.step()
    assert called == [8, 16, 20, 24, 27]
    with Loop(tmp_path, before_point=lambda: called.append(loop.updates)) as loop:
        loop.recorder.start()
        for _ in range(33):
            loop.step()
    assert called == [8, 16, 20, 24, 27, 40]  # the last member needs no point


def test_a_point_is_written_whenever_that_many_updates_are_passed_however_they_are_recorded(tmp_path):
    with Loop(tmp_path, resume_every=8) as loop:
        copies = []
        for n in (7, 0, 2, 6, 0, 4):  # 7, 7, 9, 15, 15, 19
            loop.step(n)
            copies.append(loop.copies)
    assert copies == [1, 1, 2, 2, 2, 3]  # with the rehearsal after the first update


def test_a_run_left_where_its_last_point_is_writes_no_other(tmp_path):
    with Loop(tmp_path, resume_every=5) as loop:
        loop.step(5)
    assert loop.copies == 2  # with the rehearsal
    with Loop(tmp_path) as loop:
        loop.recorder.start()
    assert loop.copies == 1  # the rehearsal's


def test_a_state_that_cannot_be_loaded_leaves_the_point_as_it_was(tmp_path, monkeypatch, caplog):
    with Loop(tmp_path) as loop:
        loop.step(5)
    before = (tmp_path / "resume" / "point.safetensors").read_bytes()

    def load(self, tensors, values):
        raise DataError("of another model")

    loop = Loop(tmp_path)
    monkeypatch.setattr(Loop, "load", load)
    with pytest.raises(DataError, match="of another model"):
        loop.recorder.start()
    loop.recorder.close()
    assert (tmp_path / "resume" / "point.safetensors").read_bytes() == before
    assert caplog.messages[-1].endswith("it resumes after update 5")


# ------------------------------------------------------------------------------------------------ what it says


@pytest.mark.parametrize(
    ("resumable", "updates", "crash", "expected"),
    [
        (True, 10, False, "left after 10 of 60 updates; it resumes after update 10"),
        (True, 25, True, "left after 25 of 60 updates; it resumes after update 20"),
        (True, 10, True, "left after 10 of 60 updates; there is no resume point"),
        (False, 25, False, "left after 25 of 60 updates; there is no resume point"),
    ],
)
def test_a_run_left_early_says_where_and_whether_it_resumes(tmp_path, caplog, resumable, updates, crash, expected):
    def leave():
        with Loop(tmp_path, resumable=resumable) as loop:
            for _ in range(updates):
                loop.step()
            if crash:
                raise CrashedError

    if crash:
        with pytest.raises(CrashedError):
            leave()
    else:
        leave()
    assert caplog.record_tuples == [("snapcore", logging.WARNING, f"{tmp_path}: {expected}")]


def test_a_run_that_resumes_says_so_and_one_that_is_finished_says_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Loop(tmp_path) as loop:
        loop.recorder.start()
        loop.step(5)
    caplog.clear()
    with Loop(tmp_path) as loop:
        loop.recorder.start()
        for n in (15, 20, 20):
            loop.step(n)
    assert caplog.messages == [f"{tmp_path}: resumed after update 5 of 60"]


# ------------------------------------------------------------------------------------------------ what it refuses


@pytest.fixture
def left(tmp_path):
    """A run that was left after 25 updates, with one member and a point."""
    with Loop(tmp_path / "run") as loop:
        loop.step(20)
        loop.step(5)
    return tmp_path / "run"


OTHERS = [CosineCycles(0.1, 60, 3), CosineCycles(0.2, 90, 3), program("star", lr=0.2, steps=60, cycles=3)]


@pytest.mark.parametrize("plan", OTHERS)
def test_another_program_is_refused(left, plan):
    with pytest.raises(StoreError, match=r"an unfinished run of another program: choose another.*resume=False"):
        Loop(left, plan)
    SnapshotStore(left, "w").close()  # the refusal freed the lock


def test_another_framework_is_refused(left):
    with pytest.raises(StoreError, match="holds a run of numpy: resume it with that"):
        Loop(left, framework="jax")


def test_another_framework_may_begin_where_nothing_was_trained(tmp_path):
    Loop(tmp_path).recorder.close()
    with Loop(tmp_path, framework="jax") as loop:
        loop.step(20)
    assert counts(loop) == [(20, 20)]


def test_a_finished_run_is_refused(tmp_path):
    pushed(tmp_path, STAR)
    with pytest.raises(StoreError, match=r"holds a run that is finished \(3 members\): load it with"):
        pushed(tmp_path, STAR)


def test_resume_false_moves_the_unfinished_run_aside_and_starts_anew(left):
    with Loop(left, resume=False) as loop:
        assert loop.recorder.start() == ()
        assert loop.recorder.cursor.step == 0
        loop.step(20)
    assert counts(loop) == [(20, 20)]
    assert read_point(left.with_name("run.1")).state["place"]["step"] == 25


def test_members_without_a_point_are_refused(left):
    shutil.rmtree(left / "resume")
    with pytest.raises(StoreError, match=r"an unfinished run without a resume point \(1 members\): choose another"):
        Loop(left)


def test_what_cannot_be_resumed_takes_its_members_and_is_refused_when_it_is_opened_again(tmp_path):
    with Loop(tmp_path, resumable=False, resume_every=5) as loop:
        for _ in range(25):
            loop.step()
    assert counts(loop) == [(20, 20)]
    assert not (tmp_path / "resume").exists()
    with pytest.raises(StoreError, match="an unfinished run without a resume point"):
        Loop(tmp_path, resumable=False)


def test_a_manifest_that_lacks_a_member_which_the_point_counts_is_refused(left):
    manifest = unseal((left / "snapcore.json").read_bytes())
    (left / "snapcore.json").write_bytes(seal({**manifest, "members": []}))
    with pytest.raises(CorruptSnapshotError, match=r"has members \[\], but its resume point counts 1"):
        Loop(left)


def test_a_manifest_with_a_member_that_the_point_does_not_count_is_refused(left):
    with SnapshotStore(left, "w") as store:
        store.save({"updates": [0]}, index=2, step=40, cycle=1, lr=0.1, framework="numpy")
    with pytest.raises(CorruptSnapshotError, match=r"has members \[1, 2\], but its resume point counts 1"):
        Loop(left)


@pytest.mark.parametrize("resume", [True, False])
def test_a_point_whose_manifest_was_deleted_is_not_resumed(left, resume):
    for name in ("snapcore.json", "snapshot-001.safetensors"):
        (left / name).unlink()
    with pytest.raises(CorruptSnapshotError, match=r"has a resume point, but snapcore\.json knows of no run"):
        Loop(left, resume=resume)


def test_a_damaged_point_is_refused(left):
    file = left / "resume" / "point.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptSnapshotError, match=r"point\.safetensors is not what was written"):
        Loop(left)


def test_a_damaged_member_that_the_point_refers_to_is_refused_and_left_alone(tmp_path):
    with Loop(tmp_path) as loop:
        loop.step(20)
    file = tmp_path / "snapshot-001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with (
        pytest.raises(CorruptSnapshotError, match=r"snapshot-001\.safetensors does not have the SHA-256"),
        Loop(tmp_path) as loop,
    ):
        loop.recorder.start()
    assert loop.recorder.program == Program("snapshot", SIXTY)
    assert read_point(tmp_path).state["place"]["step"] == 20
