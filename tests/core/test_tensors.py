"""What may become a member and what fits a model, by name."""

import math

import ml_dtypes
import numpy as np
import pytest

from snapcore.errors import DataError, DivergedError
from snapcore.store import check_finite, check_fit

FLOATS = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.complex64, np.complex128]


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_tensors_and_masks_of_minus_infinity_pass(dtype):
    check_finite({"w": np.ones((2, 3), dtype), "mask": np.array([0, -math.inf], dtype)}, "member 1")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_tensor_with_nan_or_infinity_is_refused_by_name(dtype, bad):
    broken = np.array([[1, bad], [-math.inf, bad]], dtype)
    with pytest.raises(DivergedError, match=r"member 3 at update 60 is refused: 2 of 4 values of 'layer\.w' are not"):
        check_finite({"good": np.ones(3), "layer.w": broken}, "member 3 at update 60")


@pytest.mark.parametrize("bad", [complex(0, math.nan), complex(0, math.inf), complex(-math.inf, math.inf)])
def test_the_imaginary_part_counts_too(bad):
    with pytest.raises(DivergedError, match="1 of 2 values of 'phase'"):
        check_finite({"phase": np.array([1, bad])}, "member 1")


def test_tensors_that_are_not_floating_or_hold_nothing_pass():
    check_finite({"count": np.array(7), "mask": np.array([True]), "raw": np.empty(0), "scalar": np.float32(2)}, "it")


def test_equal_names_and_shapes_fit_in_any_order():
    check_fit({"a": (2, 3), "b": ()}, {"b": (), "a": (2, 3)}, "the member")


def test_what_does_not_fit_is_listed_by_name_and_shape():
    given, wanted = {"a": (2, 3), "c": (1,)}, {"a": (3, 2), "b": ()}
    with pytest.raises(DataError) as caught:
        check_fit(given, wanted, "member 2")
    assert str(caught.value) == (
        "member 2 does not fit the model (3 differences): 'b' () is missing; 'c' (1,) is not in the model; "
        "'a' is (2, 3), the model's is (3, 2)"
    )


def test_of_many_differences_five_are_shown():
    with pytest.raises(DataError, match=r"\(5 differences\)") as five:
        check_fit({}, {f"w{k}": (k,) for k in range(5)}, "it")
    with pytest.raises(DataError, match=r"\(40 differences\)") as forty:
        check_fit({}, {f"w{k}": (k,) for k in range(40)}, "it")
    assert str(five.value).count("is missing") == str(forty.value).count("is missing") == 5
    assert str(forty.value).endswith("; …")
    assert not str(five.value).endswith("…")
