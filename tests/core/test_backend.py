"""Backends are found by name; one whose framework is missing says what to install."""

from importlib.metadata import EntryPoint

import numpy as np
import pytest
from scipy import stats

from snapcore import backend
from snapcore.backend import GROUP, available_backends, check_outputs, load_backend, negative_log_density, targets
from snapcore.data import TrainingData
from snapcore.errors import BackendNotFoundError, DataError, SnapcoreError

THIRD = EntryPoint("third", "collections:OrderedDict", GROUP)
TORCH = EntryPoint("torch", "snapcore_torch_is_not_there.backend:TorchBackend", GROUP)
ELSEWHERE = EntryPoint("elsewhere", "a_package_that_is_not_there:Backend", GROUP)


@pytest.fixture
def registered(monkeypatch):
    """Three entry points in the group, and nothing in any other."""

    def entry_points(*, group):
        return [THIRD, TORCH, ELSEWHERE] if group == "snapcore.backends" else []

    monkeypatch.setattr(backend, "entry_points", entry_points)


@pytest.mark.usefixtures("registered")
def test_registered_backends_are_listed_without_being_imported():
    assert available_backends() == {"third": THIRD, "torch": TORCH, "elsewhere": ELSEWHERE}


@pytest.mark.usefixtures("registered")
def test_a_backend_of_a_third_party_is_loaded_by_its_name():
    import collections

    assert type(load_backend("third")) is collections.OrderedDict


@pytest.mark.usefixtures("registered")
def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        BackendNotFoundError,
        match=r"no backend is called 'caffe'; known: elsewhere, jax, keras, tensorflow, third, torch\. A",
    ):
        load_backend("caffe")


@pytest.mark.usefixtures("registered")
def test_a_backend_whose_framework_is_missing_names_the_extra():
    with pytest.raises(BackendNotFoundError, match=r"pip install 'snapcore\[torch\]'") as caught:
        load_backend("torch")
    assert "No module named 'snapcore_torch_is_not_there'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.usefixtures("registered")
def test_a_third_party_s_missing_framework_is_named_without_an_extra():
    with pytest.raises(BackendNotFoundError, match="'a_package_that_is_not_there'") as caught:
        load_backend("elsewhere")
    assert "pip install" not in str(caught.value)


def test_a_backend_that_is_not_registered_at_all_names_the_extra(monkeypatch):
    monkeypatch.setattr(backend, "entry_points", lambda *, group: [])
    assert available_backends() == {}
    with pytest.raises(
        BackendNotFoundError,
        match=r"known: jax, keras, tensorflow, torch\. Install it with: pip install 'snapcore\[torch\]'",
    ):
        load_backend("torch")


def test_an_error_inside_a_backend_is_not_taken_for_a_missing_one(monkeypatch):
    broken = EntryPoint("broken", "operator:index", GROUP)  # called without arguments, it raises TypeError
    monkeypatch.setattr(backend, "entry_points", lambda *, group: [broken])
    with pytest.raises(TypeError):
        load_backend("broken")


def test_not_found_is_a_lookup_error_and_a_snapcore_error():
    assert issubclass(BackendNotFoundError, LookupError)
    assert issubclass(BackendNotFoundError, SnapcoreError)


def data(y, n_classes, loss="squared-error"):
    return TrainingData(np.zeros((len(y), 3)), y, n_classes, batch_size=1, loss=loss)


@pytest.mark.parametrize(
    ("y", "n_classes", "shape"),
    [(np.arange(4.0), 1, (4, 1)), (np.ones((4, 1)), 1, (4, 1)), (np.ones((4, 5, 2), np.float16), 2, (4, 5, 2))],
)
def test_values_come_with_an_axis_of_their_own_in_float32(y, n_classes, shape):
    found = targets(data(y, n_classes))
    assert (found.shape, found.dtype) == (shape, np.float32)
    assert np.array_equal(found.ravel(), y.ravel())


def test_labels_come_as_float32_and_class_numbers_as_they_are():
    labels, classes = np.array([[True, False]]), np.array([[1, 0]], np.uint8)
    assert targets(data(labels, 2, "binary-cross-entropy")).tolist() == [[1.0, 0.0]]
    assert targets(data(labels, 2, "binary-cross-entropy")).dtype == np.float32
    assert targets(data(classes, 2, "cross-entropy")) is classes


@pytest.mark.parametrize(
    ("task", "found"),
    [
        (data(np.zeros(4, int), 3, "cross-entropy"), (2, 99)),  # the loss itself sees what fits
        (data(np.zeros((4, 6, 7), int), 3, "cross-entropy"), (2, 6, 7, 3)),
        (data(np.zeros((4, 6, 7), int), 3, "cross-entropy"), (None, None, None, 3)),
        (data(np.zeros(4), 1), (2, 1)),
        (data(np.zeros((4, 6, 2)), 2, "gaussian-nll"), (2, 6, 4)),
    ],
)
def test_outputs_that_fit_the_targets_pass(task, found):
    check_outputs(task, lambda x: found)


@pytest.mark.parametrize(
    ("task", "found", "message"),
    [
        (data(np.zeros(4), 1), (2,), r"must return \[batch, 1\] .*got \[batch\]: build it with the number of outputs"),
        (
            data(np.zeros(4), 1, "gaussian-nll"),
            (2, 1),
            r"must return \[batch, 2\] for loss='gaussian-nll'.*\[batch, 1\]",
        ),
        (data(np.zeros((4, 6), int), 3, "cross-entropy"), (2, 3, 6), r"got \[batch, 3, 6\]: .*permute\(0, 2, 1\) does"),
        (data(np.zeros((4, 6, 7, 2)), 2), (2, 2, 6, 7), r"move its axis 1 to the end, as permute\(0, 2, 3, 1\) does"),
        (data(np.zeros((4, 6, 7, 2)), 2), (2, None, 7, 3), r"got \[batch, None, 7, 3\]: build it"),
    ],
)
def test_outputs_that_do_not_fit_the_targets_are_refused(task, found, message):
    with pytest.raises(DataError, match=message):
        check_outputs(task, lambda x: found)


def test_a_model_s_outputs_are_looked_at_for_two_examples():
    asked = []
    check_outputs(data(np.zeros(4), 1), lambda x: asked.append(x.shape) or (2, 1))
    assert asked == [(2, 3)]


@pytest.mark.parametrize("shape", [(5,), (4, 3)])
@pytest.mark.parametrize("values", [1, 3])
def test_the_negative_log_density_is_that_of_the_normal_distribution(shape, values):
    mean, logs, y = np.random.default_rng(0).normal(size=(3, *shape, values)) * 3
    expected = -stats.norm.logpdf(y, mean, np.exp(logs / 2))
    np.testing.assert_allclose(negative_log_density(np.concatenate([mean, logs], -1), y, np.exp), expected)
