"""The resume point's file: what comes back, what is replaced, and what is noticed."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import snapcore.store.resume_point
from snapcore import CorruptSnapshotError, StoreError
from snapcore.store import Member, ResumePoint, clear_point, read_point, write_point

MEMBER = Member(2, "snapshot-002.safetensors", "5" * 64, step=9, due=9, cycle=1, lr=0.1, framework="numpy")
POINT = ResumePoint({"moment": np.arange(3.0), "weights/w": np.ones((2, 2), "f4")}, {"place": {"step": 7}})
OTHER = ResumePoint({"moment": np.zeros(3)}, {"place": {"step": 9}}, MEMBER)

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
def test_a_point_comes_back_bit_for_bit(tensors, state, at_member):
    point = ResumePoint(tensors, state, MEMBER if at_member else None)
    with tempfile.TemporaryDirectory() as directory:
        write_point(Path(directory), point)
        assert same(read_point(Path(directory)), point)


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
    write_point(tmp_path, ResumePoint({"it": array}, {}))
    found = read_point(tmp_path).tensors["it"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found.astype(float), array.astype(float))
    found[...] = 0  # it may be trained on


def test_a_point_without_tensors_comes_back_too(tmp_path):
    point = ResumePoint({}, {"place": 1}, MEMBER)
    write_point(tmp_path, point)
    assert same(read_point(tmp_path), point)


def test_where_there_is_no_point_there_is_none_to_read_or_clear(tmp_path):
    assert read_point(tmp_path) is None
    clear_point(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_point_replaces_the_one_before_in_one_file(tmp_path):
    for point in (POINT, OTHER):
        write_point(tmp_path, point)
        assert same(read_point(tmp_path), point)
        assert [path.name for path in (tmp_path / "resume").iterdir()] == ["point.safetensors"]


@pytest.mark.parametrize("name", ["replace", "fsync", "open"])
def test_a_point_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, name):
    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    write_point(tmp_path, POINT)
    with monkeypatch.context() as patched:
        patched.setattr(os, name, fails)
        with pytest.raises(StoreError, match=r"could not be written, which needs 24 bytes.*No space.*point before"):
            write_point(tmp_path, OTHER)
    assert same(read_point(tmp_path), POINT)
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
        write_point(tmp_path, ResumePoint({}, {"values": {"scale": value}}))
    assert same(read_point(tmp_path), POINT)


def test_a_tensor_that_could_not_be_read_back_is_refused_by_name(tmp_path):
    with pytest.raises(StoreError, match="'names' must be of a type that can be read back"):
        write_point(tmp_path, ResumePoint({"names": np.array(["a"])}, {}))


def test_clearing_removes_the_point_and_its_folder(tmp_path):
    write_point(tmp_path, POINT)
    clear_point(tmp_path)
    assert read_point(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_point_that_cannot_be_deleted_is_reported(tmp_path, monkeypatch):
    def fails(path):
        raise PermissionError(13, "Permission denied")

    write_point(tmp_path, POINT)
    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(StoreError, match=r"resume cannot be deleted: .*Permission denied"):
        clear_point(tmp_path)


# ------------------------------------------------------------------------------------------------ damage


def damaged(content):
    """Files that differ in any one byte, end early, or have something behind them."""
    for position, byte in enumerate(content):
        mask = (0x01, 0x20, 0x80, 0xFF)[position % 4]
        yield content[:position] + bytes([byte ^ mask]) + content[position + 1 :]
    yield from (content[:length] for length in range(0, len(content), 5))
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


def rewritten(directory, **changes):
    """Have a point that was written otherwise, with a digest that fits."""
    with pytest.MonkeyPatch.context() as patched:
        dumps = json.dumps
        patched.setattr(
            snapcore.store.resume_point.json, "dumps", lambda content, **options: dumps({**content, **changes})
        )
        write_point(directory, POINT)


def test_a_format_of_another_version_is_not_called_damaged(tmp_path):
    rewritten(tmp_path, format=2)
    with pytest.raises(StoreError, match=r"has format 2, this snapcore reads 1; upgrade snapcore") as caught:
        read_point(tmp_path)
    assert type(caught.value) is StoreError


@pytest.mark.parametrize("member", [{"index": 0}, "2", {"index": 1, "file": 1}])
def test_a_member_that_is_none_is_refused(tmp_path, member):
    rewritten(tmp_path, member=member)
    with pytest.raises(CorruptSnapshotError, match="is not what was written"):
        read_point(tmp_path)


def test_a_file_of_tensors_that_is_no_point_is_refused(tmp_path):
    write_point(tmp_path, POINT)
    snapcore.store.resume_point.save_file({"w": np.ones(3)}, file(tmp_path))
    with pytest.raises(CorruptSnapshotError, match="is not what was written"):
        read_point(tmp_path)


def test_a_point_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def fails(path):
        raise OSError(5, "Input/output error")

    write_point(tmp_path, POINT)
    monkeypatch.setattr(snapcore.store.resume_point, "read_metadata", fails)
    with pytest.raises(StoreError, match=r"cannot be read: .*Input/output error") as caught:
        read_point(tmp_path)
    assert type(caught.value) is StoreError
