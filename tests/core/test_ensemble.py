"""Combining members, against NumPy's own averages and against itself by another route."""

import collections
import doctest
import importlib
import math
import pkgutil
import tracemalloc
import types

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import ensemble
from snapcore.ensemble import (
    are_probabilities,
    check_activation,
    check_members,
    check_strategy,
    combine,
    pick,
    predict,
    prefix_curve,
    reason,
    refuse_equal_members,
    refuse_like,
    refuse_mapped,
    refuse_probabilities,
    softmax_axis,
)
from snapcore.errors import DataError, StoreError
from snapcore.metrics import brier, nll, score


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@st.composite
def ensembles(draw):
    """Predictions [members, examples, classes] of up to 8 members, and labels."""
    shape = draw(st.tuples(st.integers(1, 8), st.integers(1, 12), st.integers(2, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=shape) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    return softmax(logits), rng.integers(shape[2], size=shape[1])


def some_members(n_members=4, shape=(6, 3), dtype=np.float64):
    return softmax(np.random.default_rng(7).normal(size=(n_members, *shape))).astype(dtype)


class Lazy:
    """Members that are made when asked for, as forward passes are; remembers what was asked."""

    def __init__(self, members):
        self.members, self.read = members, []

    def __len__(self):
        return len(self.members)

    def __getitem__(self, index):
        self.read.append(index)
        return self.members[index]


# --- combine


@given(ensembles(), st.data())
def test_the_ensemble_is_the_mean_of_the_last_m_members(data, draw):
    p, _ = data
    m = draw.draw(st.integers(1, len(p)))
    np.testing.assert_allclose(combine(p, last=m), p[-m:].mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(combine(p), p.mean(axis=0), rtol=1e-13)


@given(ensembles(), st.data())
def test_weights_are_those_of_numpy_average_whatever_their_scale(data, draw):
    p, _ = data
    m = draw.draw(st.integers(1, len(p)))
    w = np.array(draw.draw(st.lists(st.floats(0.001, 1000), min_size=m, max_size=m)))
    expected = np.average(p[-m:], axis=0, weights=w)
    for scaled in (w, w * 1e-290, w * 1e290):
        np.testing.assert_allclose(combine(p, last=m, weights=scaled), expected, rtol=1e-12)


def test_enormous_weights_do_not_overflow():
    p = some_members(2)
    np.testing.assert_allclose(combine(p, weights=[1.7e308, 1.7e308]), p.mean(axis=0))


def test_a_member_of_weight_zero_does_not_count():
    p = some_members(3)
    np.testing.assert_allclose(combine(p, weights=[0, 1, 3]), 0.25 * p[1] + 0.75 * p[2])


def test_a_running_mean_is_not_biased_to_the_first_member():
    """torch-uncertainty's running mean of 1, 2, 3, 4 is 1, 1.33, 1.75, 2.2; the mean is 1, 1.5, 2, 2.5."""
    members = [np.array([[value]]) for value in (0.1, 0.2, 0.3, 0.4)]
    forwards = [combine(members[:m]).item() for m in (1, 2, 3, 4)]
    assert forwards == pytest.approx([0.1, 0.15, 0.2, 0.25])
    streamed = [combine(iter(members[:m])).item() for m in (1, 2, 3, 4)]
    assert streamed == pytest.approx([0.1, 0.15, 0.2, 0.25])
    curve = [math.exp(-row["nll"]) for row in prefix_curve(members[::-1], [0])]
    assert curve == pytest.approx([0.1, 0.15, 0.2, 0.25])


@given(ensembles())
def test_an_array_a_list_a_lazy_sequence_and_an_iterator_agree(data):
    p, _ = data
    expected = combine(p)
    np.testing.assert_array_equal(combine(list(p)), expected)
    np.testing.assert_array_equal(combine(p.tolist()), expected)
    np.testing.assert_array_equal(combine(Lazy(p)), expected)
    np.testing.assert_allclose(combine(iter(p)), expected, rtol=1e-13)


@given(ensembles(), st.data())
def test_an_iterator_gives_its_last_m_members_too(data, draw):
    p, _ = data
    m = draw.draw(st.integers(1, len(p)))
    weights = np.arange(1, m + 1)
    np.testing.assert_array_equal(combine(iter(p), last=m), combine(p, last=m))
    np.testing.assert_array_equal(combine(iter(p), last=m, weights=weights), combine(p, last=m, weights=weights))
    np.testing.assert_array_equal(combine(iter(p[-m:]), weights=weights), combine(p[-m:], weights=weights))


def test_of_a_lazy_sequence_only_the_last_m_are_read_each_once():
    members = Lazy(some_members(5))
    combine(members, last=2)
    assert sorted(members.read) == [3, 4]


@pytest.mark.parametrize("weights", [None, [1, 1, 2, 1, 1, 2]])
def test_memory_does_not_grow_with_the_number_of_members(weights):
    shape = (500, 400)
    one = 8 * math.prod(shape)

    class Made:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return np.full(shape, index / 8)

    tracemalloc.start()
    result = combine(Made(), weights=weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.shape == shape
    # the sum, the member at hand and the one being made, and what weights scale
    assert peak < (3.5 if weights is None else 4.5) * one


@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 3), (2, 4, 4, 3)])
def test_members_may_have_any_shape(shape):
    p = np.random.default_rng(3).uniform(size=(4, *shape))
    got = combine(p)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, p.mean(axis=0))


def test_an_empty_batch_gives_an_empty_answer():
    assert combine(np.empty((3, 0, 10))).shape == (0, 10)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.float64, np.float64),
        (np.float32, np.float32),
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
    ],
)
@pytest.mark.parametrize("weights", [None, [1, 2, 3, 4]])
def test_the_answer_has_the_members_float_dtype_but_at_least_float32(dtype, expected, weights):
    p = some_members(dtype=dtype)
    got = combine(p, weights=weights)
    assert got.dtype == expected
    exact = np.average(p.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(got, exact, rtol=1e-6)


def test_the_sum_is_kept_in_float64():
    """A float32 sum of 20 000 members drifts in the fifth digit; the answer is right to float32."""
    member = np.full((1, 2), 0.1, dtype=np.float32)
    assert combine(member for _ in range(20_000)).tolist() == member.tolist()


@given(ensembles())
def test_an_average_of_ones_is_one_and_passes_the_check_again(data):
    p, _ = data
    weights = p[:, 0, 0]
    np.testing.assert_array_equal(combine(np.ones_like(p), weights=weights), np.ones(p.shape[1:]))


def test_members_are_left_as_they_were():
    p = some_members()
    before = p.copy()
    combine(p, last=1)[:] = 0
    combine(p, weights=[1, 2, 3, 4])
    np.testing.assert_array_equal(p, before)


@given(ensembles(), st.data())
def test_the_ensemble_is_never_worse_than_its_members_are_on_average(data, draw):
    """Jensen's inequality: −ln and the square are convex, so NLL and Brier score can only gain."""
    p, y = data
    m = draw.draw(st.integers(1, len(p)))
    together = combine(p, last=m)
    assert nll(together, y) <= np.mean([nll(member, y) for member in p[-m:]]) + 1e-12
    assert brier(together, y) <= np.mean([brier(member, y) for member in p[-m:]]) + 1e-12


@pytest.mark.parametrize("make", [list, iter, Lazy])
@pytest.mark.parametrize(
    ("last", "message"), [(0, "got 0"), (-1, "got -1"), (5, r"last must be in 1\.\.members=4, got 5")]
)
def test_last_outside_the_members_is_refused(make, last, message):
    with pytest.raises(DataError, match=message):
        combine(make(some_members(4)), last=last)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1, 1], r"one number per member used \(2\), got shape \(3,\)"),
        (1.0, r"one number per member used \(2\), got shape \(\)"),
        ([0, 0], r"not all 0, got \[0\.0, 0\.0\]"),
        ([2, -1], "not negative"),
        ([1, math.nan], "must be finite"),
        ([1, math.inf], "must be finite"),
    ],
)
@pytest.mark.parametrize("make", [list, iter])
def test_weights_that_do_not_fit_are_refused(make, weights, message):
    with pytest.raises(DataError, match=message):
        combine(make(some_members(3)), last=2, weights=weights)


@pytest.mark.parametrize("last", [None, 1])
@pytest.mark.parametrize("nothing", [[], np.empty((0, 3, 2)), iter([]), (m for m in ())])
def test_no_members_are_refused(nothing, last):
    with pytest.raises(DataError, match="at least one member is required, got none"):
        combine(nothing, last=last)


@pytest.mark.parametrize("make", [list, iter])
def test_members_of_different_shapes_are_refused_even_where_they_would_broadcast(make):
    with pytest.raises(DataError, match=r"must have one shape, got .*\(1, 3\).* predict the same examples"):
        combine(make([np.full((1, 3), 0.3), np.full((6, 3), 0.3)]))


@pytest.mark.parametrize("value", [-0.5, 1.5, math.nan, math.inf])
@pytest.mark.parametrize(("make", "position"), [(list, -3), (iter, 1)])
def test_logits_are_refused_by_member_and_position_with_the_cure(make, position, value):
    p = some_members()
    p[1, 2, 0] = value
    message = (
        rf"combine averages probabilities; member \[{position}\] must be finite and in 0\.\.1, "
        rf"got {value:g} at \[2, 0\]; apply softmax first"
    )
    with pytest.raises(DataError, match=message):
        combine(make(p))


# --- prefix_curve


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@given(data=ensembles())
def test_row_m_is_the_score_of_the_last_m_combined(dtype, data):
    p, y = data[0].astype(dtype), data[1]
    expected = [{"m": m, **score(combine(p, last=m), y)} for m in range(1, len(p) + 1)]
    assert prefix_curve(p, y) == expected
    assert prefix_curve(iter(p), y) == expected


def test_the_curve_reads_each_member_exactly_once_and_the_last_first():
    members = Lazy(some_members(5))
    rows = prefix_curve(members, np.zeros(6, dtype=int))
    assert members.read == [4, 3, 2, 1, 0]
    assert [row["m"] for row in rows] == [1, 2, 3, 4, 5]
    assert list(rows[0]) == ["m", "error", "nll", "brier", "ece"]


def test_the_curve_holds_one_member_at_a_time():
    shape = (500, 400)

    class Made:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return np.full(shape, 1 / 400)

    tracemalloc.start()
    rows = prefix_curve(Made(), np.zeros(500, dtype=int))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 12
    assert peak < 6 * 8 * math.prod(shape)


def test_wrong_labels_are_refused_before_a_second_member_is_read():
    members = Lazy(some_members(5))
    with pytest.raises(DataError, match=r"labels must be in 0\.\.2, got 3 at position 0"):
        prefix_curve(members, [3] * 6)
    assert members.read == [4]


def test_a_curve_of_logits_names_the_member_and_the_cure():
    p = some_members()
    p[0, 0, 0] = 4.0
    with pytest.raises(DataError, match=r"prefix_curve averages probabilities; member \[-4\].*apply softmax first"):
        prefix_curve(p, [0] * 6)


@pytest.mark.parametrize("nothing", [[], iter([])])
def test_a_curve_of_no_members_is_refused(nothing):
    with pytest.raises(DataError, match="at least one member is required"):
        prefix_curve(nothing, [0])


@given(ensembles())
def test_a_softmax_is_recognised_and_its_logits_are_not(data):
    probabilities, _ = data
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        with pytest.raises(DataError, match=r"already are probabilities .*pass activation='identity'"):
            refuse_probabilities(probabilities.astype(dtype))
        refuse_probabilities((np.log(probabilities) - 3).astype(dtype))  # all of them below 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_probabilities_may_be_off_by_what_it_rounds(dtype):
    exact = np.full((2, 1000), 1 / 1000)
    rounded = exact.astype(dtype)
    assert abs(rounded.astype(np.float64).sum(-1) - 1).max() > 1e-5
    off = np.array([[0.5, 0.49]])
    for outputs in (rounded, off.astype(dtype)):
        with pytest.raises(DataError, match="already are probabilities"):
            refuse_probabilities(outputs)
    refuse_probabilities(off)
    refuse_probabilities(np.array([[0.5, 0.45]]).astype(dtype))


NEARLY = [[[0.5, 0.5], [0.9, 0.3]], [[1.5, -0.5]], [[np.nan, 1.0]], np.eye(3, dtype=int)]


@pytest.mark.parametrize("outputs", [*NEARLY, np.empty((0, 2)), np.empty((2, 0)), 1.0])
def test_what_only_looks_a_little_like_probabilities_passes(outputs):
    refuse_probabilities(np.asarray(outputs))


@pytest.mark.parametrize("outputs", [np.empty((0, 1)), np.ones((3, 1)), np.ones((2, 5, 1), np.int32), np.ones(1)])
def test_softmax_over_one_output_is_refused(outputs):
    with pytest.raises(DataError, match=r"softmax over one output is 1 whatever it is: pass activation='sigmoid'"):
        refuse_probabilities(outputs)


@pytest.mark.parametrize("number", [0, 1])
def test_every_row_must_be_of_probabilities(number):
    outputs = np.full((2, 4), 0.25)
    assert are_probabilities(outputs)
    outputs[number] *= 2
    assert not are_probabilities(outputs)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_probabilities_are_recognised_along_any_axis(axis):
    outputs = np.moveaxis(np.full((2, 5, 3), [0.5, 0.25, 0.25]), -1, axis)
    with pytest.raises(DataError, match="already are probabilities"):
        refuse_probabilities(outputs, axis)
    refuse_probabilities(outputs, axis - 1)
    with pytest.raises(DataError, match="softmax over one output"):
        refuse_probabilities(outputs[..., None], 3)


@pytest.mark.parametrize(
    ("shape", "axis", "classes_last", "found"),
    [
        ((8, 3), None, True, -1),
        ((8, 3), None, False, -1),
        ((8, 5, 3), None, True, -1),
        ((8, 3, 5, 5), 1, False, 1),
        ((8, 5, 3), -1, False, -1),
        ((3,), 0, True, 0),
        ((None, 3), None, True, -1),
    ],
)
def test_the_axis_of_softmax_is_the_users_or_the_only_one_it_can_be(shape, axis, classes_last, found):
    assert softmax_axis(shape, axis, classes_last=classes_last) == found


@pytest.mark.parametrize(
    ("shape", "axis", "classes_last", "message"),
    [
        ((8,), None, True, r"got shape \(8,\): pass activation='sigmoid' .*, or axis=0"),
        ((), None, False, r"got shape \(\)"),
        ((8, 3, 5, 5), None, False, r"\(8, 3, 5, 5\) may be its axis 1 or its last: pass axis=1 or axis=-1"),
        ((8, 5, 3), None, False, "pass axis=1 or axis=-1"),
        ((8, 3), 2, True, r"axis must be in -2\.\.1 for outputs of shape \(8, 3\), got 2"),
        ((8, 3), -3, True, "got -3"),
        ((8, 1), None, True, "softmax over one output"),
        ((8, 1, 5), 1, False, "softmax over one output"),
    ],
)
def test_an_axis_that_is_not_there_or_not_plain_is_refused(shape, axis, classes_last, message):
    with pytest.raises(DataError, match=message):
        softmax_axis(shape, axis, classes_last=classes_last)


def is_array(value):
    return isinstance(value, np.ndarray)


ARRAY = np.ones(2)
Named = collections.namedtuple("Named", ["logits", "hidden"])


@pytest.mark.parametrize(
    ("returned", "output"),
    [
        (ARRAY, None),
        ({"logits": ARRAY}, "logits"),
        ({0: ARRAY}, 0),
        ((1, ARRAY), 1),
        ([ARRAY], -1),
        (Named(ARRAY, 1), "logits"),
        (types.SimpleNamespace(logits=ARRAY), "logits"),
        ((ARRAY, 1), lambda returned: returned[0]),
    ],
)
def test_one_array_is_picked_of_what_a_model_returns(returned, output):
    assert pick(returned, output, is_array) is ARRAY


@pytest.mark.parametrize(
    ("returned", "output", "message"),
    [
        (
            {"a": ARRAY, "logits": ARRAY},
            None,
            r"got dict: pass output='logits', or another of its keys \['a', 'logits'\]",
        ),
        ({"a": ARRAY}, None, r"got dict: pass output='a', or another of its keys \['a'\]"),
        ((ARRAY, 1), None, r"got tuple: pass output=0, or another position in 0\.\.1"),
        ((), None, "got tuple: pass output=, the name"),
        ({}, None, "got dict: pass output=, the name"),
        (None, None, "got NoneType: pass output=, the name of the tensor's attribute or a function that picks it"),
        ({"a": ARRAY}, "b", r"output='b' must be in what the model returns, which is dict with keys \['a'\]"),
        ((ARRAY,), 3, "output=3 must be in what the model returns, which is tuple"),
        (ARRAY, "logits", "output='logits' must be in what the model returns, which is ndarray"),
        (3, 0, "output=0 must be in what the model returns, which is int"),
        ({"a": 1}, "a", "output= must pick one tensor of what the model returns, got int"),
        (
            (ARRAY, ARRAY),
            lambda returned: returned,
            "output= must pick one tensor of what the model returns, got tuple",
        ),
    ],
)
def test_what_is_no_array_is_refused_with_what_to_pass(returned, output, message):
    with pytest.raises(DataError, match=message):
        pick(returned, output, is_array)


def different(*arrays):
    return lambda: [[np.asarray(array)] for array in arrays]


OTHER_WEIGHTS = different([1.0, 2.0], [1.0, 3.0])


@pytest.mark.parametrize("outputs", [[0.25, 0.5], [[0.0, 1.0, 0.3]], [0.3], [[-0.0, 2.0]]])
def test_members_of_different_weights_that_give_the_same_are_refused(outputs):
    with pytest.raises(DataError, match="weights differ, yet their outputs are bit-equal: do this"):
        refuse_equal_members([np.array(outputs)] * 2, OTHER_WEIGHTS, "do this")
    assert refuse_equal_members([np.array(outputs)] * 2, different([1.0], [1.0]), "")
    assert refuse_equal_members([np.array(outputs)], OTHER_WEIGHTS, "")  # alone
    assert refuse_equal_members([np.array(outputs)] * 2 + [np.array(outputs) * 2], OTHER_WEIGHTS, "")
    assert refuse_equal_members([np.array(outputs), np.array([outputs])], OTHER_WEIGHTS, "")
    assert refuse_equal_members([(np.array(outputs) * 9).astype(int)] * 2, OTHER_WEIGHTS, "")  # labels may be equal


@pytest.mark.parametrize("outputs", [[], [0.0, 0.0], [[0.0, 1.0], [1.0, 0.0]], [[0.25] * 4] * 2, [0.5]])
def test_outputs_that_weights_may_have_no_part_in_decide_nothing(outputs):
    """Zeros through a model without biases, a saturated softmax, an empty batch."""
    assert not refuse_equal_members([np.array(outputs)] * 3, OTHER_WEIGHTS, "")


def test_members_of_other_shapes_or_numbers_of_weights_differ():
    for weights in (different([1.0], [1.0, 2.0]), lambda: [[np.ones(1)], [np.ones(1), np.ones(1)]]):
        with pytest.raises(DataError, match="bit-equal"):
            refuse_equal_members([np.array([0.25, 0.5])] * 2, weights, "")


def test_no_more_members_are_run_than_decide():
    ran = []

    def outputs():
        for number in range(5):
            ran.append(number)
            yield np.array([0.25, 0.5 + min(number, 2)])

    def weights():
        raise AssertionError("they are compared only where outputs are equal")

    assert refuse_equal_members(outputs(), weights, "")
    assert ran == [0, 1]


def test_batches_are_run_one_by_one_and_joined():
    ran = []

    def run(x):
        ran.append(len(x))
        return x * 2

    batches = [(np.arange(3), "labels"), [np.arange(2)], np.arange(1)]
    assert predict(run, iter(batches)).tolist() == [0, 2, 4, 0, 2, 0]
    assert ran == [3, 2, 1]
    with pytest.raises(DataError, match="at least one batch, got none"):
        predict(run, [])


def test_another_librarys_error_becomes_a_part_of_one_line():
    assert reason(ValueError("one\n\n  two")) == "one two"
    assert reason(KeyError()) == "KeyError"
    long = reason(ValueError("word " * 100))
    assert len(long) <= 120
    assert long.endswith(" …")


def test_arguments_that_every_adapter_takes_are_refused_in_the_same_words():
    check_activation("softmax")
    check_activation(abs)
    check_strategy("loop", ["loop"])
    check_members([1])
    refuse_like(None)
    refuse_mapped(False)
    for check, error, message in (
        (
            lambda: check_activation("relu"),
            DataError,
            r"one of \['gaussian', 'identity', 'sigmoid', 'softmax'\] or a callable",
        ),
        (lambda: check_strategy("fast", ["loop"]), DataError, r"strategy must be one of \['loop'\], got 'fast'"),
        (lambda: check_members([]), StoreError, "at least one finished member"),
        (lambda: refuse_like({}), DataError, "like must be left out: .* got dict"),
        (lambda: refuse_mapped(True), DataError, "mapped=True is for PyTorch alone"),
    ):
        with pytest.raises(error, match=message):
            check()


@pytest.mark.parametrize("name", [each.name for each in pkgutil.iter_modules(ensemble.__path__)])
def test_the_examples_in_the_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(f"snapcore.ensemble.{name}")).failed == 0
