"""Killed at every moment at which a run touches its directory, and started again: nothing is different in the end."""

import functools
import json
import os
import shutil
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import snapcore.store.directory
import snapcore.store.resume_point
from snapcore import CosineCycles, Program, Restart, StepDecay, StoreError, program
from snapcore.store import SnapshotStore

from .training import RESTARTS, NumpyBackend, assert_same, managed, members_of, pushed, simulate, undisturbed

STAR = Program("star", CosineCycles(0.2, 9, 3), Restart("first", "reset"))

TOUCHES = [
    (SnapshotStore, "put"),
    (SnapshotStore, "add"),
    (SnapshotStore, "describe"),
    (SnapshotStore, "write_point"),
    (SnapshotStore, "clear_point"),
    (snapcore.store.directory, "write_tensors"),
    (snapcore.store.resume_point, "write_tensors"),
    (Path, "write_bytes"),
    (os, "fsync"),
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
]


@pytest.fixture(scope="module", autouse=True)
def _no_flush():
    """Have nothing wait for the disk; a process that dies takes none of what it has written with it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


class Killed(BaseException):
    """What the loop gets instead of the signal that nobody gets."""


class Moments:
    """Counts the moments before and after every touch; from the deadly one on, the dead touch nothing."""

    def __init__(self, deadly):
        self.deadly, self.count, self.turn = deadly, 0, threading.RLock()

    def __call__(self):
        with self.turn:
            self.count += self.count != self.deadly
            if self.count == self.deadly:
                raise Killed(f"at moment {self.deadly}")

    def around(self, touch):
        @functools.wraps(touch)
        def touched(*args, **kwargs):
            self()
            result = touch(*args, **kwargs)
            self()
            return result

        return touched


@contextmanager
def killed_at(moment):
    """Raise in the middle of whatever the run does; what it leaves is what a real kill leaves."""
    moments = Moments(moment)
    with pytest.MonkeyPatch.context() as patched:
        for owner, name in TOUCHES:
            patched.setattr(owner, name, moments.around(getattr(owner, name)))
        yield moments


def survives(start, moment):
    """Whether a start came to its end, or found that one before it had."""
    try:
        with killed_at(moment):
            start()
    except Killed:
        return False
    except StoreError as error:
        assert "holds a run that is finished" in str(error)  # noqa: PT017  killed after its last word
    return True


def manifest(directory):
    """Its members and program, as text, with the digests of their files."""
    return (Path(directory) / "snapcore.json").read_text()


def assert_nothing_is_different(directory, whole, expected):
    assert_same(members_of(directory), expected)
    assert manifest(directory) == manifest(whole)
    left = {path.name for path in Path(directory).iterdir()} - {path.name for path in Path(whole).iterdir()}
    assert left <= {"resume"} | {name for name in left if name.startswith(".tmp")}


def test_killed_at_any_moment_a_run_has_the_members_of_one_never_stopped(tmp_path):
    """Asked for in ten repositories: nothing corrupt after a kill."""
    plan = Program("star", CosineCycles(0.2, 6, 2), Restart("first", "reset"))
    whole, directory, expected = tmp_path / "whole", tmp_path / "run", undisturbed(plan)
    with killed_at(None) as moments:
        pushed(whole, plan, resume_every=2)
    assert moments.count > 50
    start = functools.partial(pushed, directory, plan, resume_every=2)
    for moment in range(1, moments.count + 1):
        assert not survives(start, moment), f"nothing was killed at moment {moment}"
        assert survives(start, None)
        assert_nothing_is_different(directory, whole, expected)
        shutil.rmtree(directory)


SCHEDULES = st.one_of(
    st.builds(CosineCycles, st.just(0.1), st.integers(6, 12), st.integers(1, 4), remainder=st.just("even")),
    st.builds(CosineCycles, st.just(0.1), st.integers(6, 12), st.integers(1, 4), warmup_steps=st.integers(0, 2)),
    st.builds(StepDecay, st.just(0.1), st.integers(6, 12), snapshots=st.integers(1, 4)),
)
PLANS = st.builds(Program, st.just("mine"), SCHEDULES, st.sampled_from(RESTARTS))
KILLS = st.lists(st.integers(1, 150), min_size=1, max_size=4)


def check(start, expected, kills):
    with tempfile.TemporaryDirectory() as directory:
        run, whole = Path(directory) / "run", Path(directory) / "whole"
        start(whole)
        for moment in kills:
            survives(functools.partial(start, run), moment)
        assert survives(functools.partial(start, run), None)
        assert_nothing_is_different(run, whole, expected)


@settings(max_examples=30, deadline=None)
@given(PLANS, st.sampled_from([None, 1, 3, 5]), KILLS)
@example(STAR, 3, [60, 60, 60])
def test_a_loop_killed_again_and_again_has_the_members_of_one_never_stopped(plan, every, kills):
    check(functools.partial(pushed, plan=plan, resume_every=every), undisturbed(plan), kills)


@settings(max_examples=30, deadline=None)
@given(PLANS, st.sampled_from([None, 1, 3, 5]), KILLS)
def test_a_managed_run_killed_again_and_again_has_the_members_of_one_never_stopped(plan, every, kills):
    check(functools.partial(managed, plan=plan, resume_every=every, seed=3), simulate(plan, 3), kills)


def killed_in(name, monkeypatch, directory):
    def dies(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(SnapshotStore, name, dies)
        with pytest.raises(Killed):
            managed(directory, STAR)


@pytest.mark.parametrize("name", ["put", "describe"])
def test_killed_before_the_first_point_it_starts_anew(tmp_path, monkeypatch, name):
    killed_in(name, monkeypatch, tmp_path)
    backend = NumpyBackend()
    managed(tmp_path, STAR, backend)
    assert next(entry for entry in backend.log if entry[0] in ("load", "train")) == ("train", 0, 3)
    assert_same(members_of(tmp_path), simulate(STAR, 0))


def test_killed_between_the_point_and_the_manifest_it_resumes_with_the_member_that_the_point_names(
    tmp_path, monkeypatch
):
    killed_in("add", monkeypatch, tmp_path)
    assert json.loads(manifest(tmp_path))["members"] == []
    written = (tmp_path / "snapshot-001.safetensors").stat()
    backend = NumpyBackend()
    managed(tmp_path, STAR, backend)
    assert [entry for entry in backend.log if entry[0] in ("load", "train")][:2] == [("load",), ("train", 3, 6)]
    assert (tmp_path / "snapshot-001.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    assert_same(members_of(tmp_path), simulate(STAR, 0))


@pytest.mark.parametrize("method", ["single", "cosine", "nocycle", "snapshot", "singlecycle", "independent", "star"])
def test_every_method_resumes_after_a_kill(tmp_path, method):
    plan = program(method, lr=0.1, steps=12, cycles=3)

    def dies(step):
        if step == plan.updates - 1:
            raise Killed

    with pytest.raises(Killed):
        pushed(tmp_path, plan, after=dies, resume_every=2)
    pushed(tmp_path, plan)
    assert_same(members_of(tmp_path), undisturbed(plan))
