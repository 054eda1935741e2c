"""Named arrays, as the suites compare them: bit for bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def frozen(tensors: Mapping[str, Any]) -> Arrays:
    """Return a copy that nothing changes any more."""
    return {name: np.array(array) for name, array in tensors.items()}


def assert_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Assert that both have the same names, and under each the same values."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def assert_all_equal(found: list[Arrays], expected: list[Arrays]) -> None:
    """Assert that the arrays of every update are equal."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
