"""Directories that were made to harm: what is no file, never ends, is huge, or says absurd things of itself."""

import errno
import json
import os
import shutil
import stat
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import snapcore.store.atomic
from snapcore.errors import (
    BackendNotFoundError,
    CorruptSnapshotError,
    DataError,
    DivergedError,
    ScheduleError,
    StoreError,
    printable,
)
from snapcore.store import (
    ResumePoint,
    SnapshotStore,
    map_tensors,
    move_aside,
    read_point,
    read_regular,
    seal,
    tied_names,
)

from .test_resume import state

MEMBER = "snapshot-001.safetensors"
POINT = "resume/point.safetensors"
FILES = [".lock", "snapcore.json", MEMBER, POINT]


def save(store, index=1, **fields):
    given = {"step": 10 * index, "cycle": index - 1, "lr": 0.1, "framework": "numpy", **fields}
    return store.save({"w": np.arange(6.0)}, index=index, **given)


@pytest.fixture
def run(tmp_path):
    with SnapshotStore(tmp_path / "run", "w") as store:
        save(store)
        store.write_point(ResumePoint({"moment": np.ones(3)}, state()))
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------ what is no file


def pipe(path):
    os.mkfifo(path)


def listener(path):
    os.mknod(path, 0o600 | stat.S_IFSOCK)


def directory(path):
    path.mkdir()


def sparse(path):
    with path.open("wb") as file:
        file.truncate(2**42)


def sparse_behind_a_length(path):
    """The first eight bytes promise the longest header that fits."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**42 - 8) + b"{")
        file.truncate(2**42)


def sparse_behind_the_file(path):
    with path.open("ab") as file:
        file.truncate(2**42)


# A process of its own per kind, so that its memory can be measured, and what never ends is ended.
REFUSE = """
import resource, sys
from snapcore.errors import StoreError
from snapcore.store import SnapshotStore, read_point
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
uses = {
    ".lock": lambda run: SnapshotStore(run, "w"),
    "snapcore.json": SnapshotStore,
    "snapshot-001.safetensors": lambda run: SnapshotStore(run).load(1),
    "resume/point.safetensors": read_point,
}
for name, use in uses.items():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        use(f"{sys.argv[1]}/{name.replace('/', '-')}")
        print(name, "accepted")
    except StoreError as error:
        said = str(error)
        print(name, "refused" if said.isprintable() and name in said else said)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert used < 50_000, f"{name}: {used} kB"
"""


@pytest.mark.parametrize("make", [pipe, listener, directory, sparse, sparse_behind_a_length, sparse_behind_the_file])
def test_what_is_no_file_of_a_run_is_refused_at_once_by_name_and_in_little_memory(run, tmp_path, make):
    for name in FILES:
        directory = tmp_path / name.replace("/", "-")
        shutil.copytree(run, directory)
        if make is not sparse_behind_the_file:
            (directory / name).unlink()
        make(directory / name)
    command = [sys.executable, "-c", REFUSE, tmp_path]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    # Nothing is ever read of a lock, so that it may have any size.
    lock = "accepted" if make.__name__.startswith("sparse") else "refused"
    assert found == [f".lock {lock}", *(f"{name} refused" for name in FILES[1:])]


def test_a_pipe_does_not_stop_a_writer(run):
    for name in FILES:
        whole = (run / name).read_bytes()
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(StoreError, match="is not a regular file"):
            everything(run)
        (run / name).unlink()
        (run / name).write_bytes(whole)
    everything(run)


def everything(run):
    with SnapshotStore(run, "w") as store:
        store.verify()
        store.read_point()


def test_a_file_that_is_longer_than_expected_is_not_read(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 11)
    with pytest.raises(StoreError, match="has 11 bytes, and at most 10 were expected"):
        read_regular(tmp_path / "file", limit=10)
    assert read_regular(tmp_path / "file", limit=11) == b"x" * 11


def test_a_manifest_that_no_reader_would_take_is_not_written(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        with pytest.raises(StoreError, match=r"a manifest must be what snapcore\.json can hold: .* bytes are more"):
            store.describe(program={"text": "x" * 2**24})
        assert store.program is None
    assert SnapshotStore(tmp_path).program is None


def nested(levels):
    return json.loads(
        '{"a":' * (levels // 2) + "[" * (levels - levels // 2) + "]" * (levels - levels // 2) + "}" * (levels // 2)
    )


def test_a_program_that_is_deeper_than_any_is_neither_written_nor_read(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        store.describe(program=nested(100))
        assert store.program == nested(100)
        with pytest.raises(StoreError, match="a program has at most 100 levels of lists and objects"):
            store.describe(program=nested(101))
    (tmp_path / "snapcore.json").write_bytes(
        seal({"format": 1, "program": nested(101), "stopped": None, "members": []})
    )
    with pytest.raises(CorruptSnapshotError, match=r"snapcore\.json is not a manifest.*at most 100 levels"):
        SnapshotStore(tmp_path)


def test_settings_in_a_resume_point_are_an_object(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        store.write_point(ResumePoint({}, {**state(), "settings": {"optimizer": "SGD"}}))
        with pytest.raises(StoreError, match=r"Expected `object`, got `bool` - at `\$\.state\.settings`"):
            store.write_point(ResumePoint({}, {**state(), "settings": True}))


# ------------------------------------------------------------------------------------------------ absurd headers


def header_of(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "65 dimensions": ({"w": entry("F32", [1] * 65, 0, 4)}, b"0000"),
    "an endless dimension": ({"w": entry("F32", [0, 2**63], 0, 0)}, b""),
    "dimensions whose product overflows": ({"w": entry("U8", [2**32, 2**32], 0, 0)}, b""),
    "a dimension that is none": ({"w": entry("F32", [-1], 0, 4)}, b"0000"),
    "a dimension of text": ({"w": entry("F32", ["1"], 0, 4)}, b"0000"),
    "a fraction": ({"w": entry("F32", [1.5], 0, 4)}, b"0000"),
    "an unknown type": ({"w": entry("F99", [1], 0, 4)}, b"0000"),
    "a type that NumPy lacks": ({"w": entry("F8_E4M3", [4], 0, 4)}, b"0000"),
    "bytes behind the file": ({"w": entry("F32", [2], 0, 8)}, b"0000"),
    "bytes before the file": ({"w": entry("F32", [1], -4, 0)}, b"0000"),
    "a gap": ({"w": entry("F32", [1], 4, 8)}, b"00000000"),
    "an overlap": ({"v": entry("F32", [1], 0, 4), "w": entry("F32", [1], 0, 4)}, b"0000"),
    "more shape than bytes": ({"w": entry("F32", [9], 0, 4)}, b"0000"),
    "an entry that is none": ({"w": 3}, b""),
    "metadata that is none": ({"__metadata__": {"snapcore": 3}}, b""),
    "a list": ([], b""),
    "no JSON": (b"{{", b""),
    "no text": (b"{\xff}", b""),
    "nesting without end": (b'{"w":' * 10**5, b""),
    "an alias of nothing": ({"__metadata__": {"aliases": '{"v": "w"}'}}, b""),
    "an alias of itself": ({"__metadata__": {"aliases": '{"w": "w"}'}, "w": entry("F32", [1], 0, 4)}, b"0000"),
    "a chain of aliases": (
        {"__metadata__": {"aliases": '{"u": "v", "v": "w"}'}, "w": entry("F32", [1], 0, 4)},
        b"0000",
    ),
    "a circle of aliases": ({"__metadata__": {"aliases": '{"u": "v", "v": "u"}'}}, b""),
    "an alias for what is there": (
        {"__metadata__": {"aliases": '{"v": "w"}'}, "v": entry("U8", [1], 0, 1), "w": entry("U8", [1], 1, 2)},
        b"00",
    ),
    "aliases that are none": ({"__metadata__": {"aliases": "[1]"}, "w": entry("F32", [1], 0, 4)}, b"0000"),
    "aliases nested without end": ({"__metadata__": {"aliases": "[" * 10**5}}, b""),
}


@pytest.mark.parametrize("name", HEADERS)
def test_an_absurd_header_is_refused_by_the_name_of_its_file(run, tmp_path, name):
    header_of(tmp_path / "forged", *HEADERS[name])
    for copy in (True, False):
        with pytest.raises(CorruptSnapshotError, match="forged is not what was written"):
            map_tensors(tmp_path / "forged", copy=copy)
    for target, read in {
        MEMBER: lambda: SnapshotStore(run).load(1, verify=False),
        POINT: lambda: read_point(run),
    }.items():
        (run / target).write_bytes((tmp_path / "forged").read_bytes())
        with pytest.raises(CorruptSnapshotError, match=f"{target} is not what was written"):
            read()


def test_names_without_a_file_are_answered_in_words(tmp_path):
    for read in (map_tensors, tied_names):
        with pytest.raises(StoreError, match="nowhere does not exist; check the path"):
            read(tmp_path / "nowhere")


def test_a_file_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    save_file({"w": np.ones(3)}, tmp_path / "file")

    def full(*args):
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(StoreError, match="file does not fit into memory"):
        map_tensors(tmp_path / "file", copy=True)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path, monkeypatch):
    original, file = np.empty, tmp_path / "file"
    save_file({"w": np.ones(10_000)}, file)

    def shortened(shape, dtype):
        os.truncate(file, 200)
        return original(shape, dtype)

    monkeypatch.setattr(np, "empty", shortened)
    with pytest.raises(CorruptSnapshotError, match="file is not what was written: it became shorter while"):
        map_tensors(file, copy=True)


# ------------------------------------------------------------------------------------------------ terminal codes

CODES = "torch\x1b[31m\nmember 2: verified\r\x07\x7f\x9b\u202e\u2028\ud800"


@pytest.mark.parametrize(
    "kind", [StoreError, CorruptSnapshotError, DataError, DivergedError, ScheduleError, BackendNotFoundError]
)
def test_an_error_is_one_line_of_visible_characters_whatever_it_quotes(kind):
    said = str(kind(f"{CODES} is refused"))
    assert said.isprintable()
    assert said == (r"torch\x1b[31m\nmember 2: verified\r\x07\x7f\x9b\u202e\u2028\ud800 is refused")
    assert str(kind(said)) == said  # what is raised anew with another's words is not escaped twice


def test_what_is_visible_is_left_as_it_is():
    text = "α 0 – „läuft“ 日本 🙂 C:\\runs\\new"
    assert printable(text) == text
    assert printable(3) == "3"


@pytest.mark.parametrize(
    "make",
    [
        SnapshotStore,
        move_aside,
        lambda path: (path.mkdir(), (path / "snapcore.json").mkdir(), SnapshotStore(path, "w")),
    ],
)
def test_a_directory_with_terminal_codes_in_its_name_is_named_in_one_line(tmp_path, make):
    with pytest.raises(StoreError) as caught:
        make(tmp_path / "a\x1b[2J\nb")
    assert str(caught.value).isprintable()
    assert r"a\x1b[2J\nb" in str(caught.value)


def test_names_of_tensors_and_metrics_with_terminal_codes_come_back_and_are_escaped_in_errors(tmp_path):
    name = "w\x1b[31m\n"
    with SnapshotStore(tmp_path, "w") as store:
        member = store.save({name: np.ones(1)}, index=1, step=1, cycle=0, lr=0.1, framework=name, metrics={name: 1.0})
        with pytest.raises(StoreError) as caught:
            store.save({name: np.array(["text"])}, index=2, step=1, cycle=0, lr=0.1, framework=name)
    assert str(caught.value).isprintable()
    assert SnapshotStore(tmp_path).members == (member,)
    assert SnapshotStore(tmp_path).load(1).keys() == {name}


# ------------------------------------------------------------------------------------------------ file systems


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_a_directory_is_good_enough(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refusing_directories(number))
    with SnapshotStore(tmp_path / "run", "w") as store:
        save(store)
        store.write_point(ResumePoint({}, state()))
    SnapshotStore(tmp_path / "run").verify()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EBADF])
def test_a_directory_whose_flush_fails_otherwise_is_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refusing_directories(number))
    with pytest.raises(StoreError, match=f"snapcore.json could not be written.*{os.strerror(number)}"):
        SnapshotStore(tmp_path / "run", "w")


def refusing_directories(number):
    flush = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    return fsync


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM]
)
def test_only_who_has_no_room_is_asked_to_make_room(run, monkeypatch, number):
    original = os.open

    def fails(path, flags, *rest, **options):
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return original(path, flags, *rest, **options)

    with SnapshotStore(run, "w") as store:
        for write in (
            lambda: save(store, 2),
            lambda: store.describe(stopped="finished"),
            lambda: store.write_point(ResumePoint({"w": np.ones(2)}, state())),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(snapcore.store.atomic.os, "open", fails)
                with pytest.raises(StoreError, match=f"which needs [0-9]+ bytes: {os.strerror(number)}; ") as caught:
                    write()
            assert ("make room" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    SnapshotStore(run).verify()


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def missing(descriptor, *, blocking):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(snapcore.store.lock, "lock_descriptor", missing)
    with pytest.raises(StoreError, match=r"cannot be written: .*Function not implemented.*; choose another"):
        SnapshotStore(tmp_path, "w")
