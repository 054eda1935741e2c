"""One model out of several: the mean of weights, the line between two members, and the barrier on it."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import DataError
from snapcore.ensemble import interpolation, mean_weights, soup


def member(value, dtype=np.float32):
    return {"w": np.full((2, 3), value, dtype), "count": np.array(int(value))}


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5))
def test_the_mean_of_weights_is_numpys_in_float64(values):
    found = mean_weights([member(value) for value in values])["w"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.mean(values), rtol=1e-6, atol=1e-30 + 1e-13 * max(map(abs, values)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.complex64])
def test_each_tensor_keeps_its_type(dtype):
    found = mean_weights([member(1, dtype), member(3, dtype)])["w"]
    assert found.dtype == dtype
    assert (found == 2).all()


def test_counts_are_those_of_the_last_member_and_no_array_is_shared_with_it():
    members = [member(1), member(5)]
    found = mean_weights(members)
    assert found["count"] == 5
    assert not any(np.shares_memory(found[name], members[1][name]) for name in found)


def test_weights_are_shares():
    assert mean_weights([member(0), member(8)], [1, 3])["w"][0, 0] == 6


@pytest.mark.parametrize(
    ("members", "weights", "words"),
    [
        ([], None, "at least one member"),
        ([member(0), {"w": np.zeros(3)}], None, "'count' is in one alone"),
        ([member(0), {**member(0), "w": np.zeros(3)}], None, r"'w' must have one shape, got \(3,\) in member 2"),
        ([member(0)], [1, 2], "must be 1 numbers"),
        ([member(0)], [-1], "not negative"),
        ([member(0), member(1)], [0, 0], "not all 0"),
    ],
)
def test_members_that_do_not_fit_together_are_refused(members, weights, words):
    with pytest.raises(DataError, match=words):
        mean_weights(members, weights)


def valley(weights):
    """Return an error that is 0 at −1 and 1, and 10 in between."""
    return float(10 * (1 - weights["w"][0, 0] ** 2))


def test_the_line_runs_from_one_member_to_the_other_and_its_barrier_is_the_height_between_them():
    found = interpolation(member(-1), member(1), valley)
    assert len(found.shares) == len(found.scores) == 25
    np.testing.assert_allclose(found.scores, 10 * (1 - (2 * found.shares - 1) ** 2), atol=1e-5)
    assert found.barrier == pytest.approx(10)


def test_a_slope_is_no_barrier():
    assert interpolation(member(0), member(1), lambda weights: float(weights["w"][0, 0])).barrier < 1e-6


def test_a_line_of_two_points_is_refused():
    with pytest.raises(DataError, match="points must be at least 3"):
        interpolation(member(0), member(1), valley, points=2)


def test_members_of_one_basin_become_their_mean():
    found = soup([member(0.9), member(1.1), member(1.0)], valley)
    np.testing.assert_allclose(found["w"], 1.0, rtol=1e-6)


def test_members_of_two_basins_are_refused_with_the_barrier_unless_it_is_forced():
    with pytest.raises(DataError, match=r"members 1 and 3 .* a barrier of 10.0 points"):
        soup([member(-1), member(1), member(1)], valley)
    assert soup([member(-1), member(1)], valley, force=True)["w"][0, 0] == 0


def test_members_are_called_by_their_names():
    with pytest.raises(DataError, match="members 3 and 7 do not share a basin"):
        soup([member(-1), member(1)], valley, names=[3, 7])
