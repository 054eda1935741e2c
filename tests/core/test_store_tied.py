"""Tied weights: what shares memory is written once, and comes back under each of its names."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from snapcore.errors import CorruptSnapshotError
from snapcore.store import SnapshotStore, map_tensors, tied_names


def save(directory, tensors):
    with SnapshotStore(directory, "w") as store:
        return directory / store.save(tensors, index=1, step=1, cycle=0, lr=0.1, framework="numpy").file


def test_a_tied_tensor_is_written_once_and_read_under_both_names(tmp_path):
    embedding = np.arange(100_000, dtype=np.float32).reshape(1000, 100)
    once = save(tmp_path / "once", {"embedding": embedding}).stat().st_size
    file = save(tmp_path / "tied", {"embedding": embedding, "head": embedding})
    assert once < file.stat().st_size < once + 500
    store = SnapshotStore(tmp_path / "tied")
    for loaded in (store.load(1), store.load(1, verify=False), map_tensors(file), map_tensors(file, copy=True)):
        assert list(loaded) == ["embedding", "head"]
        for array in loaded.values():
            np.testing.assert_array_equal(array, embedding)


def test_the_file_is_read_by_safetensors_alone_under_the_first_name(tmp_path):
    weight = np.arange(6.0)
    file = save(tmp_path, {"b": weight, "a": weight, "c": weight.copy()})
    found = load_file(file)
    assert found.keys() == {"b", "c"}
    np.testing.assert_array_equal(found["b"], weight)
    with safe_open(file, framework="np") as opened:
        assert json.loads(opened.metadata()["aliases"]) == {"a": "b"}
    assert tied_names(file) == {"a": "b"}
    assert tied_names(save(tmp_path / "untied", {"w": weight})) == {}


def test_tensors_that_came_back_are_independent_of_each_other(tmp_path):
    weight = np.zeros(3)
    save(tmp_path, {"a": weight, "b": weight})
    loaded = SnapshotStore(tmp_path).load(1)
    loaded["a"] += 1
    assert loaded["b"].tolist() == [0, 0, 0]


BASE = np.arange(24.0).reshape(4, 6)
UNTIED = {
    "a copy": (BASE, BASE.copy()),
    "another start": (BASE[:2], BASE[1:3]),
    "another shape": (BASE, BASE.reshape(6, 4)),
    "other strides": (BASE[:, :4], np.lib.stride_tricks.as_strided(BASE, (4, 4), (32, 8))),
    "the transposed": (BASE[:4, :4], BASE[:4, :4].T),
    "another type": (BASE, BASE.view(np.int64)),
    "nothing at all": (np.empty((0, 3)), np.empty((0, 3))),
    "lists": ([1.0, 2.0], [1.0, 2.0]),
    "numbers": (1.0, 1.0),
}


@pytest.mark.parametrize("name", UNTIED)
def test_what_does_not_share_all_of_its_memory_is_written_twice(tmp_path, name):
    one, other = UNTIED[name]
    file = save(tmp_path, {"one": one, "other": other})
    found = load_file(file)
    np.testing.assert_array_equal(found["one"], one)
    np.testing.assert_array_equal(found["other"], other)


HALF, BIG, SCALAR = np.ones(5, ml_dtypes.bfloat16), np.arange(5, dtype=">f4"), np.array(2.5)
TIED = {
    "itself": (BASE, BASE),
    "a view of it": (BASE, BASE[:]),
    "a column": (BASE[:, 1], BASE[:, 1]),
    "the transposed": (BASE.T, BASE.T),
    "bfloat16": (HALF, HALF[:]),
    "big-endian": (BIG, BIG[:]),
    "0 dimensions": (SCALAR, SCALAR),
}


@pytest.mark.parametrize("name", TIED)
def test_what_shares_its_memory_in_any_layout_is_written_once(tmp_path, name):
    one, other = TIED[name]
    file = save(tmp_path, {"one": one, "other": other})
    assert load_file(file).keys() == {"one"}
    for array in SnapshotStore(tmp_path).load(1).values():
        np.testing.assert_array_equal(array, one)


class Fresh:
    """Gives a new array whenever it is asked, whose memory is free again a moment later."""

    def __init__(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return np.full((50, 50), self.value, order="F")


def test_arrays_that_are_made_for_the_question_are_not_mistaken_for_each_other(tmp_path):
    save(tmp_path, {str(value): Fresh(value) for value in range(50)})
    loaded = SnapshotStore(tmp_path).load(1)
    assert {name: array[0, 0] for name, array in loaded.items()} == {str(value): value for value in range(50)}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_whatever_is_tied_to_whatever_comes_back(tmp_path_factory, which):
    directory = tmp_path_factory.mktemp("run")
    arrays = [np.full(3, value, np.int16) for value in range(5)]
    tensors = {f"w{name}": arrays[value] for name, value in enumerate(which)}
    file = save(directory, tensors)
    assert len(load_file(file)) == len(set(which))
    loaded = SnapshotStore(directory).load(1)
    assert {name: array.tolist() for name, array in loaded.items()} == {
        name: array.tolist() for name, array in tensors.items()
    }


def test_aliases_are_guarded_by_the_digest_of_the_file(tmp_path):
    weight = np.arange(6.0)
    file = save(tmp_path, {"aa": weight, "bb": weight})
    data = file.read_bytes()
    assert data.count(b'\\"bb\\"') == 1
    file.write_bytes(data.replace(b'\\"bb\\"', b'\\"cc\\"'))
    with pytest.raises(CorruptSnapshotError, match="does not have the SHA-256"):
        SnapshotStore(tmp_path).load(1)
