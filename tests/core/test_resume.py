"""The resume point's file: what comes back, what is replaced, and what is noticed."""

import copy
import hashlib
import json
import os
import pathlib
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

import snapcore.store.tensor_file
from snapcore import CorruptSnapshotError, CosineCycles, Cursor, StoreError
from snapcore.run import random_state
from snapcore.store import Member, ResumePoint, SnapshotStore, read_point
from snapcore.store.tensor_file import TensorFile

MEMBER = Member(2, "snapshot-002.safetensors", "5" * 64, step=9, due=9, cycle=1, lr=0.1, framework="numpy")
RANDOM = {**random_state(), "framework": [1, 2]}
PROCESS = {"random": RANDOM, "data": {"epoch": 1, "batches": 3, "random": RANDOM}}


def state(values=None, step=7):
    cursor = Cursor(CosineCycles(0.1, 60, 3))
    cursor.advance(step)
    position = json.loads(json.dumps(cursor.state_dict()))
    return {"framework": "numpy", "place": position, "values": values or {}, "processes": [copy.deepcopy(PROCESS)]}


POINT = ResumePoint({"moment": np.arange(3.0), "weights/w": np.ones((2, 2), "f4")}, state())
OTHER = ResumePoint({"moment": np.zeros(3)}, state(step=9), MEMBER)


def write_point(directory, point):
    with SnapshotStore(directory, "w") as store:
        store.write_point(point)


def clear_point(directory):
    with SnapshotStore(directory, "w") as store:
        store.clear_point()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
DTYPES = st.sampled_from(["?", "i1", "u2", "i8", "u8", "f2", "f4", "f8", "c8", ml_dtypes.bfloat16]).map(np.dtype)
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
NAMES = st.text(st.characters(codec="utf-8"), max_size=9).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw):
    dtype, shape = draw(DTYPES), draw(SHAPES)
    size = int(np.prod(shape)) * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    return np.frombuffer(content, "?" if dtype.kind == "b" else "u1").view(dtype).reshape(shape)


def same(one, other):
    """Bit for bit, NaNs and all."""
    if (one.state, one.member, one.tensors.keys()) != (other.state, other.member, other.tensors.keys()):
        return False
    pairs = [(one.tensors[name], other.tensors[name]) for name in one.tensors]
    return all((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in pairs)


def file(directory):
    return directory / "resume" / "point.safetensors"


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, tensors(), max_size=4), st.dictionaries(st.text(), JSON, max_size=4), st.booleans())
def test_a_point_comes_back_bit_for_bit(tensors, values, at_member):
    point = ResumePoint(tensors, state(values), MEMBER if at_member else None)
    with tempfile.TemporaryDirectory() as directory:
        write_point(Path(directory), point)
        assert same(read_point(directory), point)


@pytest.mark.parametrize(
    "array",
    [
        np.empty((0, 3), np.float32),
        np.array(2.5),
        np.array([1, -2], ml_dtypes.bfloat16),
        np.arange(6.0).reshape(2, 3).T,
        np.arange(6.0)[::-2],
        np.array([np.nan, np.inf]),
    ],
)
def test_tensors_of_any_kind_and_layout_come_back_as_they_were(tmp_path, array):
    write_point(tmp_path, ResumePoint({"it": array}, state()))
    found = read_point(tmp_path).tensors["it"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found.astype(float), array.astype(float))
    found[...] = 0  # it may be trained on


def test_a_point_without_tensors_comes_back_too(tmp_path):
    point = ResumePoint({}, state(), MEMBER)
    write_point(tmp_path, point)
    assert same(read_point(tmp_path), point)


def test_where_there_is_no_point_there_is_none_to_read_or_clear(tmp_path):
    assert read_point(tmp_path) is None
    with SnapshotStore(tmp_path, "w") as store:
        assert store.read_point() is None
        store.clear_point()
        assert store.read_point() is None
    assert not (tmp_path / "resume").exists()


def test_a_newer_point_replaces_the_one_before_in_one_file(tmp_path):
    for point in (POINT, OTHER):
        write_point(tmp_path, point)
        assert same(read_point(tmp_path), point)
        assert [path.name for path in (tmp_path / "resume").iterdir()] == ["point.safetensors"]


@pytest.mark.parametrize("name", ["replace", "fsync", "open"])
def test_a_point_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, name):
    original = os.open

    def fails(*args):
        if name == "open" and not args[1] & os.O_CREAT:
            return original(*args)
        raise OSError(28, "No space left on device")

    write_point(tmp_path, POINT)
    with SnapshotStore(tmp_path, "w") as store:
        with monkeypatch.context() as patched:
            patched.setattr(os, name, fails)
            with pytest.raises(StoreError, match=r"could not be written, which needs 24 bytes: No space .*; make room"):
                store.write_point(OTHER)
        assert same(store.read_point(), POINT)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["point.safetensors"]


def test_what_a_killed_writer_left_is_swept_up_by_the_next(tmp_path):
    write_point(tmp_path, POINT)
    (tmp_path / "resume" / ".tmp-point.safetensors-12345678").write_bytes(b"half")
    write_point(tmp_path, OTHER)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["point.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.ones(3), {1, 2}])
def test_a_state_that_is_not_plain_json_is_refused_and_leaves_the_one_before(tmp_path, value):
    write_point(tmp_path, POINT)
    with pytest.raises(StoreError, match="a resume point's state must be plain JSON"):
        write_point(tmp_path, ResumePoint({}, state({"scale": value})))
    assert same(read_point(tmp_path), POINT)


def test_a_state_that_could_not_be_resumed_is_refused_and_leaves_the_one_before(tmp_path):
    write_point(tmp_path, POINT)
    for name in state():
        incomplete = state()
        del incomplete[name]
        with pytest.raises(StoreError, match=f"a resume point's state must be.*missing required field `{name}`"):
            write_point(tmp_path, ResumePoint({}, incomplete))
    assert same(read_point(tmp_path), POINT)


def test_a_tensor_that_could_not_be_read_back_is_refused_by_name(tmp_path):
    with pytest.raises(StoreError, match="'names' must be of a type that can be read back"):
        write_point(tmp_path, ResumePoint({"names": np.array(["a"])}, state()))


def test_clearing_removes_the_point_and_its_folder(tmp_path):
    write_point(tmp_path, POINT)
    clear_point(tmp_path)
    assert read_point(tmp_path) is None
    assert not (tmp_path / "resume").exists()


def test_a_point_that_cannot_be_deleted_is_reported(tmp_path, monkeypatch):
    def fails(path, **options):
        raise PermissionError(13, "Permission denied")

    write_point(tmp_path, POINT)
    with SnapshotStore(tmp_path, "w") as store:
        monkeypatch.setattr(pathlib.Path, "unlink", fails)
        with pytest.raises(StoreError, match=r"point\.safetensors cannot be deleted: Permission denied"):
            store.clear_point()
        monkeypatch.undo()


def test_a_file_called_resume_is_left_alone_and_named(tmp_path):
    (tmp_path / "resume").write_text("mine")
    with SnapshotStore(tmp_path, "w") as store:
        assert store.read_point() is None
        with pytest.raises(StoreError, match=r"point\.safetensors could not be written: .*; move resume away"):
            store.write_point(POINT)
        store.clear_point()
    assert (tmp_path / "resume").read_text() == "mine"


def test_a_point_is_written_by_the_holder_of_the_lock_alone(tmp_path):
    write_point(tmp_path, POINT)
    closed = SnapshotStore(tmp_path, "w")
    closed.close()
    for store in (closed, SnapshotStore(tmp_path)):
        for write in (lambda store=store: store.write_point(OTHER), store.clear_point):
            with pytest.raises(StoreError, match="mode='w'"):
                write()
        assert same(store.read_point(), POINT)


# ------------------------------------------------------------------------------------------------ damage


def damaged(content):
    """Files that differ in one byte, end early, or have something behind them."""
    sample = [*range(300), *range(300, len(content) - 100, 61), *range(len(content) - 100, len(content))]
    for position in sample:
        byte = content[position]
        mask = (0x01, 0x20, 0x80, 0xFF)[position % 4]
        yield content[:position] + bytes([byte ^ mask]) + content[position + 1 :]
    yield from (content[:length] for length in range(0, len(content), 97))
    yield content + b"\0"


@pytest.mark.parametrize("point", [POINT, OTHER])
def test_no_damage_goes_unnoticed(tmp_path, point):
    write_point(tmp_path, point)
    harmless = 0
    for content in damaged(file(tmp_path).read_bytes()):
        file(tmp_path).write_bytes(content)
        try:
            found = read_point(tmp_path)
        except CorruptSnapshotError as error:
            assert str(file(tmp_path)) in str(error)  # noqa: PT017  most are refused, and some change nothing
        else:
            assert same(found, point)
            harmless += 1
    assert harmless < 50  # spaces behind the header, and the like


def forge(directory, text, tensors=None):
    """Write a point that nobody wrote, with the digest that fits: computed here anew."""
    tensors = {"moment": np.arange(3.0)} if tensors is None else tensors
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode() + array.tobytes())
    file(directory).parent.mkdir(exist_ok=True)
    save_file(tensors, file(directory), metadata={"snapcore": text, "sha256": digest.hexdigest()})


def content(**changes):
    return {"format": 1, "state": state(), "member": None, **changes}


def test_a_point_of_an_earlier_writer_is_read(tmp_path):
    """The layout and the digest are those of the first version of the format, written here without its code."""
    forge(tmp_path, json.dumps(content(state=state({"scale": 2.5}))))
    assert same(read_point(tmp_path), ResumePoint({"moment": np.arange(3.0)}, state({"scale": 2.5})))


def test_integers_longer_than_any_machine_word_come_back(tmp_path):
    point = ResumePoint({}, state({"pcg64": {"state": 2**128 - 1, "inc": -(2**90)}}))
    write_point(tmp_path, point)
    assert same(read_point(tmp_path), point)


def test_a_format_of_another_version_is_not_called_damaged(tmp_path):
    forge(tmp_path, json.dumps({"format": 2, "a later field": []}))
    with pytest.raises(StoreError, match=r"has format 2, this snapcore reads 1; upgrade snapcore") as caught:
        read_point(tmp_path)
    assert type(caught.value) is StoreError


@pytest.mark.parametrize("member", [{"index": 0}, "2", {"index": 1, "file": 1}])
def test_a_member_that_is_none_is_refused(tmp_path, member):
    forge(tmp_path, json.dumps(content(member=member)))
    with pytest.raises(CorruptSnapshotError, match="is not what was written"):
        read_point(tmp_path)


def leaves(value, path=()):
    """Every position in a nested value, but for what is the framework's own."""
    yield path
    if path[-1:] in (("framework",), ("values",)):
        return
    if isinstance(value, dict):
        items = value.items()
    else:
        some = {0, 1, 2, len(value) - 1} if isinstance(value, list) else ()
        items = [(position, value[position]) for position in some if position < len(value)]
    for key, item in items:
        yield from leaves(item, (*path, key))


HOSTILE = [None, "text", [], {}, [[]], -1, 2.5, True, 2**31, 10**15, 2**64, 10**30]


def test_no_forged_value_gives_anything_but_an_error_of_the_store(tmp_path):
    """Each value of the state is replaced by one of another type or by an absurd number, and has its digest."""
    refused = 0
    for path in leaves(json.loads(json.dumps(state()))):
        for value in HOSTILE:
            forged = content()
            owner, steps = forged, ("state", *path)
            for step in steps[:-1]:
                owner = owner[step]
            owner[steps[-1]] = value
            forge(tmp_path, json.dumps(forged), {})
            try:
                found = read_point(tmp_path)
            except CorruptSnapshotError as error:
                assert "is not what was written" in str(error)  # noqa: PT017  some are harmless, see below
                refused += 1
            else:
                assert found.state == forged["state"]
                assert allowed(path, value), (path, value)
    assert refused > 300


def allowed(path, value):
    """Whether a value is as good as the one that was there; a framework's random state may be anything."""
    is_count = type(value) is int and value >= 0
    if path[-1:] == ("framework",):
        return len(path) > 1 or isinstance(value, str)
    if path[-1:] == ("values",):
        return isinstance(value, dict)
    if path[-1:] in (("stopped",), ("random",)):
        return value is None or (path[-1] == "stopped" and isinstance(value, str))
    if path[-1:] == ("gauss",) or path[-2:] == ("python", 2):  # the second of two normal numbers, drawn already
        return type(value) in (int, float) or (value is None and path[-1] == 2)
    return is_count and value < 2**32


@pytest.mark.parametrize(
    "text", ["null", "[]", '{"format": 1}', "[" * 10**5, "{", "", '{"format": "1"}', '{"format": NaN}']
)
def test_a_point_whose_text_makes_no_sense_is_refused(tmp_path, text):
    forge(tmp_path, text)
    with pytest.raises(CorruptSnapshotError, match=r"point\.safetensors is not what was written"):
        read_point(tmp_path)


def test_a_number_that_json_does_not_have_is_refused(tmp_path):
    forge(tmp_path, json.dumps(content(state=state({"scale": float("nan")}))))
    with pytest.raises(CorruptSnapshotError, match="NaN is not JSON"):
        read_point(tmp_path)


def test_a_file_of_tensors_that_is_no_point_is_refused(tmp_path):
    write_point(tmp_path, POINT)
    save_file({"w": np.ones(3)}, file(tmp_path))
    with pytest.raises(CorruptSnapshotError, match="is not what was written"):
        read_point(tmp_path)


def test_a_point_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def fails(self):
        raise OSError(5, "Input/output error")

    write_point(tmp_path, POINT)
    monkeypatch.setattr(TensorFile, "read", fails)
    with pytest.raises(StoreError, match=r"cannot be read: Input/output error") as caught:
        read_point(tmp_path)
    assert type(caught.value) is StoreError


def test_tied_tensors_of_a_point_are_written_once_and_come_back_under_each_name(tmp_path):
    tied = np.arange(1000.0)
    point = ResumePoint({"a": tied, "b": tied, "c": tied.copy()}, state())
    write_point(tmp_path, point)
    assert same(read_point(tmp_path), point)
    assert load_file(file(tmp_path)).keys() == {"a", "c"}


def test_a_point_that_is_replaced_while_it_is_read_is_the_one_that_was_opened(tmp_path, monkeypatch):
    write_point(tmp_path / "run", POINT)
    write_point(tmp_path / "other", OTHER)
    original = snapcore.store.tensor_file._read_header

    def replaced_first(*args):
        os.replace(tmp_path / "other/resume/point.safetensors", tmp_path / "run/resume/point.safetensors")  # noqa: PTH105
        return original(*args)

    monkeypatch.setattr(snapcore.store.tensor_file, "_read_header", replaced_first)
    assert read_point(tmp_path / "run").state == POINT.state
    monkeypatch.undo()
    assert read_point(tmp_path / "run").state == OTHER.state
