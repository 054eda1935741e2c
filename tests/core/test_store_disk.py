"""What disks and other processes do to a run: full, read-only, killed midway, two writers at once."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import snapcore.store.atomic
import snapcore.store.directory
from snapcore.errors import StoreError
from snapcore.store import SnapshotStore, atomic_write, move_aside
from snapcore.store.tensor_file import TensorFile

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save(store, index, size=6):
    return store.save(
        {"w": np.full(size, float(index))}, index=index, step=10 * index, cycle=index - 1, lr=0.1, framework="numpy"
    )


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def run(tmp_path):
    with SnapshotStore(tmp_path / "run", "w") as store:
        save(store, 1)
    return tmp_path / "run"


def start(program, *arguments):
    """Start a Python program that prints a line when it is where the test wants it."""
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def end(process, sign):
    process.send_signal(sign)
    process.wait()
    process.stdout.close()


def failing(call, owner, name):
    """Return a replacement of a function that fails at its `call`-th call, as on a full disk."""
    original, calls = getattr(owner, name), iter(range(1, 100))

    def replacement(*args, **kwargs):
        if next(calls) == call:
            raise FULL
        return original(*args, **kwargs)

    return replacement


@pytest.mark.parametrize(
    ("owner", "name", "call", "file"),
    [
        (os, "open", 1, "snapshot-002.safetensors"),
        (snapcore.store.directory, "write_tensors", 1, "snapshot-002.safetensors"),
        (os, "fsync", 1, "snapshot-002.safetensors"),
        (pathlib.Path, "replace", 1, "snapshot-002.safetensors"),
        (os, "fsync", 2, "snapshot-002.safetensors"),
        (pathlib.Path, "write_bytes", 1, "snapcore.json"),
        (os, "fsync", 3, "snapcore.json"),
        (pathlib.Path, "replace", 2, "snapcore.json"),
        (os, "fsync", 4, "snapcore.json"),
    ],
)
def test_a_disk_that_is_full_at_any_point_costs_no_earlier_member(run, monkeypatch, owner, name, call, file):
    with SnapshotStore(run, "w") as store:
        before = store.members
        monkeypatch.setattr(owner, name, failing(call, owner, name))
        with pytest.raises(
            StoreError, match=rf"{file} could not be written, which needs \d+ bytes: No space left on device; make room"
        ) as caught:
            save(store, 2)
        assert caught.value.__cause__ is FULL
        monkeypatch.undo()
        assert store.members == before
        assert not [left for left in names(run) if left.startswith(".tmp")]
        SnapshotStore(run).verify()
        save(store, 2)
    assert SnapshotStore(run).load(2)["w"].tolist() == [2.0] * 6


def test_a_failed_description_changes_nothing(run, monkeypatch):
    with SnapshotStore(run, "w") as store:
        monkeypatch.setattr(os, "fsync", failing(1, os, "fsync"))
        with pytest.raises(StoreError, match="No space"):
            store.describe(stopped="finished")
        assert store.stopped is None
    assert SnapshotStore(run).stopped is None


LIMITED = """
import resource, sys
import numpy as np
from snapcore.errors import StoreError
from snapcore.store import SnapshotStore
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
with SnapshotStore(sys.argv[1], "w") as store:
    try:
        store.save({"w": np.zeros(10_000)}, index=2, step=20, cycle=1, lr=0.1, framework="numpy")
    except StoreError as error:
        print(error)
    store.save({"w": np.zeros(10)}, index=2, step=20, cycle=1, lr=0.1, framework="numpy")
"""


def test_a_file_that_the_system_refuses_to_grow_is_reported_and_the_run_continues(run):
    output = subprocess.run([sys.executable, "-c", LIMITED, run], capture_output=True, text=True, check=True).stdout
    assert "snapshot-002.safetensors could not be written, which needs 80000 bytes" in output
    assert "File too large" in output
    assert names(run) == [".lock", "snapcore.json", "snapshot-001.safetensors", "snapshot-002.safetensors"]
    SnapshotStore(run).verify()


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StoreError, match="cannot be written"):
            SnapshotStore(path, "w")
    with pytest.raises(StoreError, match="cannot be read"):
        SnapshotStore(tmp_path / "file")


def test_a_manifest_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "snapcore.json").mkdir()
    with pytest.raises(StoreError, match=r"snapcore\.json is not a regular file"):
        SnapshotStore(tmp_path, "w")


def test_temporary_files_that_cannot_be_swept_are_reported(run, monkeypatch):
    (run / ".tmp-snapcore.json-01234567").write_text("")
    monkeypatch.setattr(pathlib.Path, "unlink", failing(1, pathlib.Path, "unlink"))
    with pytest.raises(StoreError, match=r"cannot be written.*No space"):
        SnapshotStore(run, "w")


def test_a_file_that_cannot_be_read_is_not_called_damaged(run, monkeypatch):
    store = SnapshotStore(run)
    for name, ask in (
        ("read", store.load),
        ("sha256", store.file),
        ("map", lambda index: store.load(index, verify=False)),
    ):
        monkeypatch.setattr(TensorFile, name, failing(1, TensorFile, name))
        with pytest.raises(StoreError, match=r"snapshot-001\.safetensors cannot be read") as caught:
            ask(1)
        assert type(caught.value) is StoreError


KILLED = """
import os, signal, sys
import numpy as np
from snapcore.store import SnapshotStore
store = SnapshotStore(sys.argv[1], "w")
print("ready", flush=True)
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "flush":
    os.fsync = die
else:
    store._write = die
store.save({"w": np.zeros(10)}, index=2, step=20, cycle=1, lr=0.1, framework="numpy")
"""


@pytest.mark.parametrize("moment", ["flush", "manifest"])
def test_a_writer_killed_while_saving_leaves_the_run_whole_and_the_next_one_sweeps_up(run, moment):
    """Asked for in ten repositories: nothing corrupt after a kill, no orphan temporary files."""
    process = start(KILLED, run, moment)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert [member.index for member in SnapshotStore(run).members] == [1]
    SnapshotStore(run).verify()
    (run / ".tmp-snapcore.json-01234567").symlink_to(run / "snapcore.json")
    (run / ".tmp-snapcore.json-89abcdef").mkdir()
    with SnapshotStore(run, "w") as store:
        assert not any(path.is_file() for path in run.glob(".tmp*"))
        save(store, 2)
    SnapshotStore(run).verify()
    assert names(run) == [
        ".lock",
        ".tmp-snapcore.json-89abcdef",
        "snapcore.json",
        "snapshot-001.safetensors",
        "snapshot-002.safetensors",
    ]


HOLDER = """
import sys
from snapcore.store import SnapshotStore
store = SnapshotStore(sys.argv[1], "w")
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_is_killed(run):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(StoreError, match="is being written by another run"):
        SnapshotStore(run, "w")
    with pytest.raises(StoreError, match="is being written by another run"):
        move_aside(run)
    SnapshotStore(run).verify()
    process.stdin.close()
    end(process, signal.SIGKILL)
    with SnapshotStore(run, "w") as store:
        save(store, 2)


def test_a_second_writer_in_the_same_process_is_refused_until_the_first_closes(run):
    with SnapshotStore(run, "w"):
        with pytest.raises(StoreError, match="is being written by another run"):
            SnapshotStore(run, "w")
        with pytest.raises(StoreError, match="is being written by another run"):
            move_aside(run)
    SnapshotStore(run, "w").close()
    move_aside(run)


def test_a_store_opened_in_one_thread_is_closed_in_another(run):
    store = SnapshotStore(run, "w")
    thread = threading.Thread(target=store.close)
    thread.start()
    thread.join()
    SnapshotStore(run, "w").close()


def test_saving_in_one_thread_and_describing_in_another_lose_nothing(run):
    with SnapshotStore(run, "w") as store:
        saving = threading.Thread(target=lambda: [save(store, index) for index in range(2, 12)])
        saving.start()
        for count in range(10):
            store.describe(program={"count": count})
        saving.join()
    reader = SnapshotStore(run)
    assert len(reader.members) == 11
    assert reader.program == {"count": 9}


def test_a_directory_that_cannot_be_renamed_says_so_and_is_not_left_locked(run, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "rename", failing(1, pathlib.Path, "rename"))
    with pytest.raises(StoreError, match=r"cannot be renamed to run\.1"):
        move_aside(run)
    SnapshotStore(run, "w").close()


def test_without_posix_directories_are_not_flushed_and_the_lock_is_freed_before_the_rename(run, monkeypatch):
    monkeypatch.setattr(snapcore.store.atomic, "POSIX", False)
    opened = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(path) or original(path, *rest, **more))
    with SnapshotStore(run, "w") as store:
        save(store, 2)
    assert run not in opened
    monkeypatch.setattr(pathlib.Path, "rename", lambda self, target: SnapshotStore(run, "w").close() or target)
    assert move_aside(run) == run.parent / "run.1"


def test_files_are_flushed_before_they_get_their_names_and_the_manifest_comes_last(run, monkeypatch):
    """A crash of the machine between any two of these leaves a manifest that names only whole files."""
    order = []
    fsync, replace = os.fsync, pathlib.Path.replace

    def flushing(descriptor):
        path = pathlib.Path(f"/proc/self/fd/{descriptor}").readlink()
        order.append(("flush", "directory" if path == run else path.name[len(".tmp-") : -len("-12345678")]))
        fsync(descriptor)

    def replacing(path, target):
        order.append(("rename", target.name))
        return replace(path, target)

    with SnapshotStore(run, "w") as store:
        monkeypatch.setattr(os, "fsync", flushing)
        monkeypatch.setattr(pathlib.Path, "replace", replacing)
        save(store, 2)
    assert order == [
        ("flush", "snapshot-002.safetensors"),
        ("rename", "snapshot-002.safetensors"),
        ("flush", "directory"),
        ("flush", "snapcore.json"),
        ("rename", "snapcore.json"),
        ("flush", "directory"),
    ]


def test_a_forgotten_members_file_that_cannot_be_deleted_is_reported(run):
    with SnapshotStore(run, "w") as store:
        (run / "snapshot-001.safetensors").unlink()
        (run / "snapshot-001.safetensors").mkdir()
        with pytest.raises(StoreError, match=r"run: a forgotten member cannot be deleted: .*directory"):
            store.truncate(0)
        assert store.members == ()
    assert SnapshotStore(run).members == ()


def interrupt(_):
    raise KeyboardInterrupt


def test_a_file_of_any_name_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "notes").write_text("old")
    for name in ("notes", "new"):
        with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / name) as temporary:
            interrupt(temporary.write_text("half"))
    assert names(tmp_path) == ["notes"]
    assert (tmp_path / "notes").read_text() == "old"
    with atomic_write(tmp_path / "notes") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["notes"]
    assert (tmp_path / "notes").read_text() == "whole"


def test_what_a_killed_writer_of_predictions_or_a_recipe_has_left_is_swept_and_nothing_behind_a_link(run, tmp_path):
    ours = [run / ".tmp-recipe.json-0123abcd", run / "predictions" / ".tmp-test.safetensors-0123abcd"]
    linked = tmp_path / "elsewhere" / ".tmp-test.safetensors-0123abcd"
    for path in (*ours, linked):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with SnapshotStore(run, "w"):
        assert not any(path.exists() for path in ours)
    ours[1].parent.rmdir()
    ours[1].parent.symlink_to(linked.parent)
    with SnapshotStore(run, "w"):
        assert linked.exists()
