"""A run writes into the directory that it opened, and into no other: moved, deleted, replaced, forked, raced for."""

import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

import snapcore.store.aside
import snapcore.store.directory
import snapcore.store.lock
from snapcore.errors import StoreError
from snapcore.store import ResumePoint, SnapshotStore, local_path, move_aside, new_member, read_point

from .test_resume import state

MOVED = "was moved, deleted or replaced while this run had it open; start again"


def save(store, index, value=1.0):
    fields = {"step": 10 * index, "cycle": index - 1, "lr": 0.1, "framework": "numpy"}
    return store.save({"w": np.full(3, value)}, index=index, **fields)


def values(directory):
    store = SnapshotStore(directory)
    return [float(store.load(member.index)["w"][0]) for member in store.members]


def content(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def home(tmp_path):
    return tmp_path / "run"


def moved(home):
    shutil.move(home, home.with_name("old"))


def deleted(home):
    shutil.rmtree(home)


def emptied(home):
    for path in home.iterdir():
        path.unlink()


def replaced_by_a_copy_of_the_same_files(home):
    """As `cp -al` makes it: each file is the same, the lock too, and only the directory is another."""
    moved(home)
    home.mkdir()
    for path in home.with_name("old").iterdir():
        os.link(path, home / path.name)


def replaced_by_another_run(home):
    moved(home)
    with SnapshotStore(home, "w") as other:
        save(other, 1, 9.0)
        save(other, 2, 9.0)


def being_replaced_by_another_run(home):
    moved(home)
    other = SnapshotStore(home, "w")
    save(other, 1, 9.0)
    other.write_point(ResumePoint({}, state()))
    OPEN.append(other)


OPEN = []
WRITES = [
    lambda store: save(store, 2),
    lambda store: store.put({"w": np.ones(3)}, new_member(index=2, step=1, cycle=0, lr=0.1, framework="numpy")),
    lambda store: store.add(store.members[0]),
    lambda store: store.describe(stopped="finished"),
    lambda store: store.write_point(ResumePoint({}, state())),
    lambda store: store.clear_point(),
    lambda store: store.truncate(0),
]


@pytest.mark.parametrize("write", WRITES, ids=["save", "put", "add", "describe", "write_point", "clear", "truncate"])
@pytest.mark.parametrize(
    "happen",
    [
        moved,
        deleted,
        emptied,
        replaced_by_a_copy_of_the_same_files,
        replaced_by_another_run,
        being_replaced_by_another_run,
    ],
)
def test_nothing_is_written_once_the_directory_is_another(home, happen, write):
    store = SnapshotStore(home, "w")
    save(store, 1)
    happen(home)
    before = content(home) if home.exists() else None
    with pytest.raises(StoreError, match=MOVED):
        write(store)
    assert (content(home) if home.exists() else None) == before
    store.close()
    for other in OPEN:
        save(other, 2, 9.0)  # it never noticed
        other.close()
    OPEN.clear()


def test_a_directory_that_is_moved_while_a_member_is_written_keeps_the_next_run_as_it_is(home, monkeypatch):
    store = SnapshotStore(home, "w")
    flush, times = os.fsync, iter([True])

    def flushing(descriptor):
        flush(descriptor)
        if next(times, False):
            replaced_by_another_run(home)

    monkeypatch.setattr(os, "fsync", flushing)
    with pytest.raises(StoreError, match=MOVED):
        save(store, 1)
    store.close()
    assert values(home) == [9.0, 9.0]
    SnapshotStore(home, "w").close()
    assert not list(home.glob(".tmp*"))


def test_a_directory_that_comes_back_is_written_again(home):
    with SnapshotStore(home, "w") as store:
        save(store, 1)
        moved(home)
        with pytest.raises(StoreError, match=MOVED):
            save(store, 2)
        home.with_name("old").rename(home)
        save(store, 2)
    assert values(home) == [1.0, 1.0]


def test_a_relative_path_means_what_it_meant_when_it_was_given(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    store = SnapshotStore("run", "w")
    monkeypatch.chdir(tmp_path / "two")
    save(store, 1)
    store.write_point(ResumePoint({}, state()))
    store.close()
    assert [path.name for path in (tmp_path / "two").iterdir()] == []
    monkeypatch.chdir(tmp_path / "one")
    assert values(tmp_path / "one" / "run") == [1.0]
    assert read_point("run") is not None
    assert move_aside("run") == tmp_path / "one" / "run.1"


def test_a_relative_path_in_a_directory_that_is_gone_is_refused(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(StoreError, match="is relative to a directory that is gone; give an absolute path"):
        SnapshotStore("run", "w")


# ------------------------------------------------------------------------------------------------ who holds the lock


def test_a_store_that_is_closed_while_a_thread_writes_finishes_that_file_and_refuses_the_next(home, monkeypatch):
    store = SnapshotStore(home, "w")
    at_disk, go = threading.Event(), threading.Event()
    flush = os.fsync

    def flushing(descriptor):
        at_disk.set()
        go.wait(30)
        flush(descriptor)

    said = []

    def write():
        try:
            save(store, 1)
        except StoreError as error:
            said.append(str(error))

    monkeypatch.setattr(os, "fsync", flushing)
    writing, closing = threading.Thread(target=write), threading.Thread(target=store.close)
    writing.start()
    at_disk.wait(30)
    closing.start()
    with pytest.raises(StoreError, match="is being written by another run"):
        SnapshotStore(home, "w")
    go.set()
    writing.join()
    closing.join()
    assert said in ([], [f"{home} is closed; open it with mode='w' to write"])
    with pytest.raises(StoreError, match=f"{home} is closed"):
        save(store, 2)
    SnapshotStore(home, "w").close()


@pytest.mark.parametrize("reused", [False, True])
def test_a_lock_whose_descriptor_someone_else_has_closed_is_noticed(home, tmp_path, reused):
    """As a daemon does that closes all it has inherited; the number may then be that of another file."""
    store = SnapshotStore(home, "w")
    os.close(store._lock._descriptor)
    other = os.open(tmp_path / "other", os.O_CREAT | os.O_RDWR) if reused else None
    assert other in (None, store._lock._descriptor)
    with pytest.raises(StoreError, match=MOVED):
        save(store, 1)
    store.close()
    if reused:
        os.close(other)  # which `close` has left open


def test_a_store_that_is_forgotten_frees_its_directory(home):
    SnapshotStore(home, "w")
    SnapshotStore(home, "w").close()


FORKS = """
import os, sys
import numpy as np
from snapcore.errors import StoreError
from snapcore.store import SnapshotStore
store = SnapshotStore(sys.argv[1], "w")
if sys.argv[2] == "turn held":
    store._turn.acquire()
child = os.fork()
if child == 0:
    try:
        store.save({"w": np.ones(2)}, index=1, step=1, cycle=0, lr=0.1, framework="numpy")
    except StoreError as error:
        print(error, flush=True)
    store.close()
    os._exit(0)
os.waitpid(child, 0)
try:
    SnapshotStore(sys.argv[1], "w")
except StoreError as error:
    print(error, flush=True)
if sys.argv[2] == "turn held":
    store._turn.release()
sleeper = os.fork()
if sleeper == 0:
    sys.stdin.read()
    os._exit(0)
store.close()
SnapshotStore(sys.argv[1], "w").close()
print("free")
"""


@pytest.mark.parametrize("turn", ["turn free", "turn held"])
def test_a_forked_child_neither_writes_nor_frees_its_parents_directory_nor_keeps_it(home, turn):
    """A data loader's workers are forked, close what they have inherited, and outlive the run."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS, home, turn]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    written, refused, free = (process.stdout.readline() for _ in range(3))
    process.communicate("", timeout=60)
    assert f"was opened by process {process.pid}; open it in this one to write" in written
    assert "is being written by another run" in refused
    assert free == "free\n"
    assert values(home) == []


def test_what_a_fork_has_copied_is_neither_written_nor_unlocked(home, monkeypatch):
    """The same as above in one process, since what a forked child does is not measured."""
    store = SnapshotStore(home, "w")
    lock = store._lock
    copies = os.dup(lock._descriptor)
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        with pytest.raises(StoreError, match="open it in this one to write"):
            save(store, 1)
        store.close()
        assert lock._release.alive
        lock.release()  # as when the child forgets the store: its copy of the descriptor is closed, and no more
    with pytest.raises(StoreError, match="is being written by another run"):
        SnapshotStore(home, "w")
    os.close(copies)
    SnapshotStore(home, "w").close()


# ------------------------------------------------------------------------------------------------ races


def interleave(monkeypatch, module, name, meanwhile):
    """Have something happen right before the first call of a function."""
    original, once = getattr(module, name), iter([True])

    def replacement(*args, **kwargs):
        if next(once, False):
            meanwhile()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, replacement)


def test_a_run_that_is_moved_aside_by_two_is_moved_once_and_the_new_one_stays(home, monkeypatch):
    with SnapshotStore(home, "w") as store:
        save(store, 1, 5.0)

    def other_process():
        move_aside(home)
        with SnapshotStore(home, "w") as store:
            save(store, 1, 9.0)

    interleave(monkeypatch, snapcore.store.lock, "lock_descriptor", other_process)
    with pytest.raises(StoreError, match=MOVED):
        move_aside(home)
    assert values(home) == [9.0]
    assert values(home.with_name("run.1")) == [5.0]


def test_a_run_that_was_moved_aside_a_moment_before_is_not_created_by_the_second(home, monkeypatch):
    SnapshotStore(home, "w").close()
    interleave(monkeypatch, snapcore.store.aside, "DirectoryLock", lambda: move_aside(home))
    with pytest.raises(StoreError, match=r"run cannot be written: .*No such file"):
        move_aside(home)
    assert sorted(path.name for path in home.parent.iterdir()) == ["run.1"]


def test_an_empty_directory_that_took_the_place_of_a_run_is_not_moved(home, monkeypatch):
    SnapshotStore(home, "w").close()

    def other_process():
        move_aside(home)
        home.mkdir()

    interleave(monkeypatch, snapcore.store.aside, "DirectoryLock", other_process)
    with pytest.raises(StoreError, match="holds no run"):
        move_aside(home)
    assert home.exists()
    assert not home.with_name("run.2").exists()


def test_a_run_that_is_moved_aside_while_it_is_opened_is_not_written(home, monkeypatch):
    SnapshotStore(home, "w").close()
    interleave(monkeypatch, snapcore.store.lock, "lock_descriptor", lambda: move_aside(home))
    with pytest.raises(StoreError, match=MOVED):
        SnapshotStore(home, "w")
    assert not home.exists()
    SnapshotStore(home.with_name("run.1"), "w").close()


def test_a_run_is_not_moved_onto_a_link_that_leads_nowhere(home):
    SnapshotStore(home, "w").close()
    home.with_name("run.1").symlink_to("nowhere")
    assert move_aside(home) == home.with_name("run.2")
    assert home.with_name("run.1").is_symlink()


# ------------------------------------------------------------------------------------------------ no path


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "https://host/run", "file:///tmp/run", "hf:/x"])
def test_a_url_is_not_taken_for_a_relative_path(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for use in (SnapshotStore, lambda path: SnapshotStore(path, "w"), read_point, move_aside):
        for given in (path, local_path("x").parent.__class__(path)):
            with pytest.raises(StoreError, match="a run needs a local directory, got"):
                use(given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a:b", "16:30 run", "c:", "é://"])
def test_a_name_with_a_colon_is_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    SnapshotStore(name, "w").close()
    assert SnapshotStore(tmp_path / name).members == ()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\ud800"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    for use in (SnapshotStore, lambda path: SnapshotStore(path, "w"), read_point, move_aside):
        with pytest.raises(StoreError):
            use(os.path.join(tmp_path, name))  # noqa: PTH118  pathlib would look at it first


def test_a_directory_that_is_deleted_while_a_file_is_written_is_what_the_error_names(home, monkeypatch):
    written = snapcore.store.directory.write_tensors

    def deleting(path, *args):
        digest = written(path, *args)
        deleted(home)
        return digest

    with SnapshotStore(home, "w") as store:
        save(store, 1)
        monkeypatch.setattr(snapcore.store.directory, "write_tensors", deleting)
        with pytest.raises(StoreError, match=MOVED):
            save(store, 2)
