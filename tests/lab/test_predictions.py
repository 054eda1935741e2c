"""Predictions of a run's members: made once, kept in the run, and made anew where something is another."""

import logging

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax

from snapcore import CorruptSnapshotError, DataError, StoreError, program
from snapcore.ensemble import Predictions
from snapcore.lab import predictions as module
from snapcore.lab.datasets import Dataset, load_data
from snapcore.lab.job import Job
from snapcore.lab.predictions import as_predicted, finished_members, predictions_file, predictions_of
from snapcore.store import SnapshotStore


class Linear:
    """A backend that knows three verbs' worth of NumPy, and counts."""

    name = "numpy"

    def __init__(self):
        self.restored = []

    def init(self, model, data, program, *, seed):
        return None

    def restore(self, state, tensors, *, optimizer):
        assert optimizer == "keep"
        self.restored.append(float(tensors["index"]))
        return tensors

    def logits(self, state, x):
        return (x.reshape(len(x), -1) @ state["w"]).astype(np.float32)


@pytest.fixture
def backend(monkeypatch):
    made = Linear()
    monkeypatch.setattr(module, "start_backend", lambda name: made)
    return made


@pytest.fixture(scope="module")
def data():
    return load_data("digits", held_out=0.2)


def save(store, index, **options):
    rng = np.random.default_rng(index)
    tensors = {"w": rng.normal(size=(64, 10)), "index": np.array(float(index))}
    store.save(tensors, index=index, step=index, cycle=0, lr=0.1, framework="numpy", **options)


@pytest.fixture
def store(tmp_path):
    plan = program("snapshot", lr=0.1, steps=6, cycles=6)
    with SnapshotStore(tmp_path / "run", "w") as opened:
        opened.describe(program=plan.to_dict())
        for index in (1, 2, 3):
            save(opened, index, unfinished=index == 2)
    return SnapshotStore(tmp_path / "run")


JOB = Job(backend="numpy", model="mlp", held_out=0.2)


def by_hand(store, index, x):
    logits = (x.reshape(len(x), -1) @ store.load(index)["w"]).astype(np.float32).astype(float)
    return log_softmax(logits, axis=-1)


@pytest.mark.parametrize("split", ["test", "held-out"])
def test_finished_members_predict_a_part_of_the_data_and_say_which(store, backend, data, split):
    found = predictions_of(store, JOB, data, split)
    x, y = (data.x_test, data.y_test) if split == "test" else (data.x_held_out, data.y_held_out)
    assert backend.restored == [1, 3]
    for member, index in zip(found, (1, 3), strict=True):
        np.testing.assert_allclose(member, by_hand(store, index, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.labels, y)
    assert (found.split, found.members) == (split, tuple(member.sha256 for member in finished_members(store)))
    assert predictions_file(store, split) == store.path / "predictions" / f"{split}.safetensors"


def test_what_is_kept_is_not_run_again_and_lies_in_its_file(store, backend, data):
    first = predictions_of(store, JOB, data)
    again = predictions_of(SnapshotStore(store.path), JOB, data)
    assert backend.restored == [1, 3]
    np.testing.assert_array_equal(again[:], first[:])
    assert not again[0].flags.writeable


def test_only_new_members_are_run(store, backend, data):
    first = predictions_of(store, JOB, data)
    with SnapshotStore(store.path, "w") as opened:
        save(opened, 4)
    found = predictions_of(SnapshotStore(store.path), JOB, data)
    assert backend.restored == [1, 3, 4]
    np.testing.assert_array_equal(found[:2], first[:])
    np.testing.assert_allclose(found[2], by_hand(SnapshotStore(store.path), 4, data.x_test), rtol=1e-5, atol=1e-5)
    assert len(Predictions.open(predictions_file(store, "test"))) == 3


def test_members_that_are_not_asked_for_are_not_read_and_what_is_kept_of_them_stays(store, backend, data):
    (store.path / "snapshot-001.safetensors").write_bytes(b"?")
    _, last = finished_members(store)
    assert predictions_of(store, JOB, data, members=[last]).members == (last.sha256,)
    with pytest.raises(CorruptSnapshotError, match="snapshot-001"):
        predictions_of(store, JOB, data)
    assert predictions_of(store, JOB, data, members=[last]).members == (last.sha256,)
    assert backend.restored == [3]


def test_a_kept_prediction_does_not_hide_that_its_member_was_altered(store, backend, data):
    predictions_of(store, JOB, data)
    (store.path / "snapshot-001.safetensors").write_bytes(b"?")
    with pytest.raises(CorruptSnapshotError, match="snapshot-001"):
        predictions_of(store, JOB, data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
        lambda path: path.unlink(),
        lambda path: Predictions(np.zeros((2, 3, 1)), [0] * 3, members=["a", "b"]).save(path),
        lambda path: Predictions(np.zeros((2, 3, 1)), [0] * 3).save(path),
    ],
)
def test_an_altered_file_is_made_anew(store, backend, data, damage):
    first = predictions_of(store, JOB, data)[:].copy()
    damage(predictions_file(store, "test"))
    np.testing.assert_array_equal(predictions_of(store, JOB, data)[:], first)
    assert backend.restored == [1, 3, 1, 3]
    predictions_of(store, JOB, data)
    assert backend.restored == [1, 3, 1, 3]


@pytest.mark.parametrize("content", [b"somebody's own", b""])
def test_a_file_that_is_somebody_elses_is_left_alone(store, backend, data, content, caplog):
    path = predictions_file(store, "test")
    path.parent.mkdir()
    path.write_bytes(content)
    with caplog.at_level("INFO"):
        assert predictions_of(store, JOB, data).examples == len(data.y_test)
    assert path.read_bytes() == content
    assert f"{path} is not snapcore's, and is not replaced" in caplog.text


def test_a_model_that_is_code_is_run_each_time_since_it_may_have_changed(store, backend, data):
    backend.init = lambda *_, **__: {"w": np.zeros((64, 10))}
    job = msgspec.structs.replace(JOB, model="builtins:len")
    for _ in range(2):
        predictions_of(store, job, data)
    assert backend.restored == [1, 3, 1, 3]


def test_the_predictions_of_another_split_are_not_taken(store, backend, data):
    predictions_of(store, JOB, data)
    predictions_file(store, "test").rename(predictions_file(store, "held-out"))
    assert predictions_of(store, JOB, data, "held-out").examples == len(data.y_held_out)
    assert backend.restored == [1, 3, 1, 3]


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"held_out": 0.3}, {"model": "cnn"}, {"precision": "bfloat16"}, {"backend": "mine"}]
)
def test_what_was_kept_for_another_job_is_not_taken(store, backend, data, other):
    predictions_of(store, JOB, data)
    job = Job(**{"backend": "numpy", "model": "mlp", "held_out": 0.2, **other})
    if "precision" in other:
        with pytest.raises(DataError, match="has no --precision"):
            predictions_of(store, job, data)
    else:
        predictions_of(store, job, data)
        assert backend.restored == [1, 3, 1, 3]


@pytest.mark.parametrize("other", [{"device": "cpu"}, {"data_dir": "/elsewhere"}])
def test_where_images_lie_and_what_computes_makes_no_difference(store, backend, data, other):
    predictions_of(store, JOB, data)
    predictions_of(store, Job(backend="numpy", model="mlp", held_out=0.2, **other), data)
    assert backend.restored == [1, 3]


def test_other_images_are_predicted_anew(store, backend, data):
    predictions_of(store, JOB, data)
    fewer = load_data("digits", held_out=0.2, train_limit=500)
    predictions_of(store, JOB, fewer)
    assert backend.restored == [1, 3, 1, 3]


def test_a_run_that_cannot_be_written_to_is_predicted_each_time(store, backend, data, caplog):
    (store.path / "predictions").touch()  # a file, so that there is no room even for root
    caplog.set_level(logging.INFO, "snapcore")
    first = predictions_of(store, JOB, data)
    np.testing.assert_array_equal(predictions_of(store, JOB, data)[:], first[:])
    assert backend.restored == [1, 3, 1, 3]
    assert "predictions are not kept" in caplog.text


def test_what_there_is_not_is_refused(store, backend, data, tmp_path):
    with pytest.raises(DataError, match="split must be one of test, held-out, got 'train'"):
        predictions_of(store, JOB, data, "train")
    with pytest.raises(DataError, match=r"run kept no training images back: train with --held-out 0\.1"):
        predictions_of(store, Job(backend="numpy"), data, "held-out")
    SnapshotStore(tmp_path / "empty", "w").close()
    with pytest.raises(StoreError, match="holds no finished member: train until"):
        predictions_of(SnapshotStore(tmp_path / "empty"), JOB, data)
    with SnapshotStore(tmp_path / "own", "w") as opened:
        save(opened, 1)
    with pytest.raises(StoreError, match="has no program: snapcore train did not make it"):
        predictions_of(SnapshotStore(tmp_path / "own"), JOB, data)


def dataset(loss, *positions):
    """Data of which only the kind and the shape of the targets matter."""
    y = np.zeros((5, *positions))
    return Dataset("mine", y, y, y, y, 2, 0.0, 1.0, "", y, y, loss)


@given(logits=arrays(np.float32, (5, 4), elements=st.floats(-1e4, 1e4, width=32)))
@settings(deadline=None)
def test_outputs_for_classes_become_log_probabilities_however_large_they_are(logits):
    found = as_predicted(dataset("cross-entropy"), logits)
    assert found.dtype == np.float32
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    np.testing.assert_allclose(found, wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)), rtol=1e-6, atol=1e-6)


@given(logits=arrays(np.float32, (5, 3), elements=st.floats(-500, 500, width=32)))
@settings(deadline=None)
def test_outputs_for_labels_become_the_logarithm_of_each_ones_sigmoid(logits):
    found = as_predicted(dataset("binary-cross-entropy", 3), logits)
    np.testing.assert_allclose(found, -np.log1p(np.exp(-logits.astype(np.float64))), rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize(("positions", "width"), [((), 1), ((3,), 3)])
def test_outputs_for_values_take_the_shape_of_the_targets(positions, width):
    outputs = np.arange(5.0 * width, dtype=np.float32).reshape(5, width)
    found = as_predicted(dataset("squared-error", *positions), outputs)
    assert found.shape == (5, *positions)
    np.testing.assert_array_equal(found.ravel(), outputs.ravel())


@pytest.mark.parametrize(("positions", "width"), [((), 1), ((3,), 3)])
def test_outputs_of_a_gaussian_head_are_means_and_then_the_logarithms_of_variances(positions, width):
    means, logs = np.random.default_rng(0).normal(size=(2, 5, width)).astype(np.float32)
    found = as_predicted(dataset("gaussian-nll", *positions), np.concatenate([means, logs], axis=1))
    assert found.shape == (5, *positions, 2)
    np.testing.assert_array_equal(found[..., 0].ravel(), means.ravel())
    np.testing.assert_allclose(found[..., 1].ravel(), np.exp(logs).ravel(), rtol=1e-6)
