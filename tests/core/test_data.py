"""The order of batches: a function of the seed and the step alone, each example at most once an epoch."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.data import LOSSES, TrainingData, check_labels
from snapcore.ensemble import KINDS
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


def of_kind(loss, y, n_classes, **options):
    return TrainingData(np.zeros((len(y), 2)), y, n_classes, batch_size=1, loss=loss, **options)


def test_every_loss_names_a_kind_of_predictions_and_every_kind_has_one():
    assert sorted(LOSSES.values()) == sorted(KINDS)


@pytest.mark.parametrize(
    ("loss", "y", "n_classes", "kind", "n_outputs"),
    [
        ("cross-entropy", np.array([0, 4]), 5, "classes", 5),
        ("cross-entropy", np.array([[[0, 1], [4, 2]]]), 5, "classes", 5),
        ("binary-cross-entropy", np.array([[0, 1, 1]]), 3, "labels", 3),
        ("binary-cross-entropy", np.array([[True, False]]), 2, "labels", 2),
        ("binary-cross-entropy", np.zeros((1, 4, 4, 2), np.float32), 2, "labels", 2),
        ("squared-error", np.array([0.5, -3.0]), 1, "values", 1),
        ("squared-error", np.zeros((2, 1)), 1, "values", 1),
        ("squared-error", np.zeros((2, 8, 8, 3), np.float16), 3, "values", 3),
        ("gaussian-nll", np.array([0.5, -3.0]), 1, "gaussian", 2),
        ("gaussian-nll", np.zeros((2, 3)), 3, "gaussian", 6),
    ],
)
def test_a_loss_says_what_kind_of_task_it_is_and_how_many_outputs_the_model_has(loss, y, n_classes, kind, n_outputs):
    data = of_kind(loss, y, n_classes)
    assert (data.kind, data.n_outputs) == (kind, n_outputs)


def test_the_order_does_not_depend_on_the_kind_of_task():
    classes = training_data(20, 3, seed=4)
    values = TrainingData(classes.x, np.zeros(20), 1, 3, 4, loss="squared-error")
    assert np.array_equal(classes.indices(0, 20), values.indices(0, 20))


@pytest.mark.parametrize(
    ("loss", "y", "n_classes", "message"),
    [
        ("hinge", np.zeros(2, int), 2, "loss must be one of cross-entropy, binary-cross-entropy, .* got 'hinge'"),
        ("cross-entropy", np.array([[0, 1], [0, 5]]), 5, r"labels must be in 0\.\.4, got 5 at position \[1, 1\]"),
        ("binary-cross-entropy", np.array([0, 1]), 1, r"y must have shape \[examples, …, n_classes\] for labels"),
        ("binary-cross-entropy", np.array([[0, 1]]), 3, r"for labels, got \(1, 2\) with n_classes=3"),
        ("binary-cross-entropy", np.array([[0, 1], [2, 1]]), 2, r"must be 0 or 1 for each label, got 2 at \[1, 0\]"),
        ("binary-cross-entropy", np.array([[0.0, np.nan]]), 2, r"must be 0 or 1 for each label, got nan at \[0, 1\]"),
        ("binary-cross-entropy", np.zeros((2, 0)), 0, "with n_classes=0"),
        ("squared-error", np.zeros((2, 3)), 1, r"y must have shape \[examples\] or \[examples, …, 1\] for values"),
        ("squared-error", np.zeros(2), 2, r"y must have shape \[examples, …, n_classes\] for values, got \(2,\)"),
        ("squared-error", np.array([1, 2]), 1, r"floats for values, got dtype int64: pass y\.astype\(np\.float32\)"),
        ("squared-error", np.array([1.0, np.inf]), 1, r"y must be finite for values, got inf at \[1\]"),
        ("squared-error", np.array([1e39, 0.0]), 1, r"finite for values, got 1e\+39 at \[0\] \(in float32\)"),
        ("gaussian-nll", np.array([[np.nan, 1.0]]), 2, r"y must be finite for gaussian, got nan at \[0, 0\]"),
        ("gaussian-nll", np.array([1 + 2j]), 1, "y must be floats for gaussian, got dtype complex128"),
    ],
)
def test_targets_that_do_not_fit_the_loss_are_refused(loss, y, n_classes, message):
    with pytest.raises(DataError, match=message):
        of_kind(loss, y, n_classes)


@pytest.mark.parametrize("ignore", [-100, 255, 1])
def test_a_label_may_be_ignored(ignore):
    labels = np.array([[0, ignore], [2, 0]])
    assert of_kind("cross-entropy", labels, 3, ignore=ignore).ignore == ignore


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([0, -1]), r"got -1 at position 1; ignore=-100 alone may lie outside"),
        (np.array([-100, -100]), "at least one label must count, got ignore=-100 alone"),
    ],
)
def test_labels_that_are_neither_classes_nor_ignored_are_refused(y, message):
    with pytest.raises(DataError, match=message):
        of_kind("cross-entropy", y, 3, ignore=-100)


@pytest.mark.parametrize("loss", ["binary-cross-entropy", "squared-error", "gaussian-nll"])
def test_only_classes_can_be_ignored(loss):
    with pytest.raises(DataError, match=f"ignore is for classes alone, got it with loss='{loss}'; leave those"):
        of_kind(loss, np.zeros((2, 1)), 1, ignore=0)
