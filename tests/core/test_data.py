"""The order of batches: a function of the seed and the step alone, each example at most once an epoch."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.data import TrainingData, check_labels
from snapcore.errors import DataError


def training_data(examples=10, batch_size=3, seed=0):
    return TrainingData(np.zeros((examples, 2)), np.zeros(examples, int), n_classes=1, batch_size=batch_size, seed=seed)


@st.composite
def some_data(draw):
    examples = draw(st.integers(1, 60))
    return training_data(examples, draw(st.integers(1, examples)), draw(st.integers(0, 2**32)))


@given(some_data(), st.integers(0, 100), st.lists(st.integers(0, 40), max_size=5))
def test_any_split_of_the_updates_gives_the_same_batches(data, start, lengths):
    stop = start + sum(lengths)
    whole = data.indices(start, stop)
    assert whole.shape == (stop - start, data.batch_size)
    assert whole.dtype == np.int64
    parts, begin = [np.empty((0, data.batch_size), np.int64)], start
    for length in lengths:
        parts.append(data.indices(begin, begin + length))
        begin += length
    assert np.array_equal(np.concatenate(parts), whole)


@given(some_data(), st.integers(0, 5))
def test_no_example_comes_twice_in_an_epoch(data, epoch):
    n = data.updates_per_epoch
    seen = data.indices(epoch * n, (epoch + 1) * n).ravel().tolist()
    assert len(seen) == len(data.x) // data.batch_size * data.batch_size
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(len(data.x)))


def test_equal_seeds_give_equal_orders_and_others_do_not():
    orders = [training_data(100, 10, seed).indices(0, 30).tobytes() for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


def test_every_epoch_has_an_order_of_its_own():
    data = training_data(50, 50)
    assert len({data.indices(epoch, epoch + 1).tobytes() for epoch in range(10)}) == 10


def test_over_the_epochs_what_is_left_over_is_not_always_the_same():
    seen = training_data(10, 7).indices(0, 40)
    assert set(seen.ravel().tolist()) == set(range(10))


def test_the_order_depends_neither_on_the_process_nor_on_what_was_asked_before():
    data = training_data(23, 4, seed=7)
    for start in (90, 0, 50, 5):
        data.indices(start, start + 3)
    code = (
        "import numpy as np; from snapcore.data import TrainingData; "
        "print(TrainingData(np.zeros(23), np.zeros(23, int), 1, 4, 7).indices(11, 14).tolist())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert fresh.strip() == str(data.indices(11, 14).tolist())


def test_changing_what_was_returned_does_not_change_the_order():
    data = training_data()
    first = data.indices(0, 3)
    kept = first.copy()
    first[:] = -1
    assert np.array_equal(data.indices(0, 3), kept)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"y": np.zeros(9, int)}, "x and y must be equally long, got 10 examples and 9 labels"),
        ({"batch_size": 11}, r"batch_size must be in 1\.\.10 examples, got 11"),
        ({"batch_size": 0}, r"batch_size must be in 1\.\.10 examples, got 0"),
        ({"batch_size": -1}, "batch_size must be in"),
        ({"y": np.full(10, 2)}, r"labels must be in 0\.\.1, got 2 at position 0"),
        ({"y": np.array([0] * 9 + [-1])}, r"labels must be in 0\.\.1, got -1 at position 9"),
        ({"y": np.zeros(10)}, r"labels must be integers in 0\.\.1, got dtype float64"),
    ],
)
def test_data_that_cannot_be_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        TrainingData(**{"x": np.zeros((10, 2)), "y": np.zeros(10, int), "n_classes": 2, "batch_size": 3, **values})


def test_without_examples_there_is_no_batch():
    with pytest.raises(DataError, match=r"batch_size must be in 1\.\.0 examples"):
        TrainingData(np.zeros((0, 2)), np.zeros(0, int), n_classes=1, batch_size=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
def test_labels_of_any_integer_type_pass(dtype):
    check_labels(np.array([0, 1, 2], dtype), 3)
    with pytest.raises(DataError, match="got 2 at position 2"):
        check_labels(np.array([0, 1, 2], dtype), 2)
