"""Nested plain values as JSON and tensors, there and back."""

import json
from collections import OrderedDict
from enum import IntEnum

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore import DataError
from snapcore.store import pack, unpack


def is_tensor(value):
    return isinstance(value, np.ndarray)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
TENSORS = st.lists(st.integers(0, 9), max_size=3).map(np.array)
KEYS = st.integers() | st.text() | st.sampled_from(["a", "b", "a/b", "0", 0, 1])
VALUES = st.recursive(
    SCALARS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
)


def written_out(value):
    """Say a value with its types, so that 1, 1.0 and True differ and NaN equals NaN."""
    if isinstance(value, dict):
        return "dict", [(written_out(key), written_out(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [written_out(item) for item in value]
    return type(value).__name__, repr(value)


def identities(value):
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    yield id(value)
    for item in items:
        yield from identities(item)


@given(VALUES)
@example({"a/b": np.array([1]), "a": {"b": np.array([2])}})
@example({1: np.array([1]), "1": np.array([2])})
@example({"float": float("-inf"), "dict": {"tensor": float("nan")}})
def test_values_come_back_through_json_as_what_they_were(value):
    packed, tensors = pack(value, "state", is_tensor)
    found = unpack(json.loads(json.dumps(packed, allow_nan=False)), tensors)
    assert written_out(found) == written_out(value)


@given(VALUES)
def test_every_tensor_is_handed_over_itself_under_a_name_that_begins_as_asked(value):
    _, tensors = pack([value, value], "state", is_tensor)
    assert all(name.startswith("state/") for name in tensors)
    assert {id(tensor) for tensor in tensors.values()} <= set(identities(value))


def test_a_tensor_is_named_by_its_path():
    value = {"state": {0: {"moment": np.ones(1)}}, "groups": [np.zeros(1)]}
    assert list(pack(value, "optimizer", is_tensor)[1]) == ["optimizer/state/0/moment", "optimizer/groups/0"]


def test_dictionaries_of_any_kind_come_back_as_plain_ones():
    packed, tensors = pack(OrderedDict(b=1, a=2), "state", is_tensor)
    assert unpack(packed, tensors) == {"b": 1, "a": 2}


class Mode(IntEnum):
    TRAIN = 1


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"a": [1, {2, 3}]}, "state/a/1", "set"),
        ({"a": {(1, 2): 3}}, "state/a", "dict"),
        ({"a": {True: 3}}, "state/a", "dict"),
        ([len], "state/0", "builtin_function_or_method"),
        ({"mode": Mode.TRAIN}, "state/mode", "Mode"),
        ({"rate": np.float64(0.1)}, "state/rate", "float64"),
    ],
)
def test_what_only_pickle_could_save_is_refused_by_its_path(value, path, kind):
    with pytest.raises(DataError, match=f"{path} is a {kind}, which cannot be saved without pickle"):
        pack(value, "state", is_tensor)
