"""Predictions of members: computed when asked for, one at a time, and scored on the way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from snapcore import StoreError
from snapcore.lab.predictions import Predictions, Scored, probabilities
from snapcore.metrics import score
from snapcore.store import SnapshotStore

LABELS = np.array([0, 2, 1, 0])
X = np.random.default_rng(1).normal(size=(4, 3))


class Linear:
    """A backend that knows three verbs' worth of NumPy, and counts."""

    name = "numpy"

    def __init__(self):
        self.restored = 0

    def restore(self, state, tensors, *, optimizer):
        assert optimizer == "keep"
        self.restored += 1
        return tensors

    def logits(self, state, x):
        return (x @ state["w"]).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    with SnapshotStore(tmp_path / "run", "w") as store:
        for index in range(1, 5):
            weights = {"w": rng.normal(size=(3, 3))}
            store.save(weights, index=index, step=index, cycle=0, lr=0.1, framework="numpy", unfinished=index in {2, 4})
    return SnapshotStore(tmp_path / "run")


def own_prediction(store, index):
    logits = (X @ store.load(index)["w"]).astype(np.float32).astype(float)
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


def test_a_member_is_computed_when_it_is_asked_for(store):
    backend = Linear()
    predictions = Predictions(store, backend, None, X)
    assert (len(predictions), backend.restored) == (2, 0)
    np.testing.assert_allclose(predictions[1], own_prediction(store, 3), rtol=1e-12)
    assert backend.restored == 1


def test_unfinished_members_are_left_out_and_last_counts_from_the_end(store):
    assert [member.index for member in Predictions(store, Linear(), None, X).members] == [1, 3]
    assert [member.index for member in Predictions(store, Linear(), None, X, last=1).members] == [3]


@pytest.mark.parametrize("last", [0, -1, 3])
def test_a_number_of_members_that_is_not_there_is_refused(last, store):
    with pytest.raises(StoreError, match=rf"last must be in 1\.\.2, the finished members of .*run; got {last}"):
        Predictions(store, Linear(), None, X, last=last)


def test_a_run_without_finished_members_is_refused(tmp_path):
    SnapshotStore(tmp_path / "run", "w").close()
    with pytest.raises(StoreError, match="holds no finished member: train until"):
        Predictions(SnapshotStore(tmp_path / "run"), Linear(), None, X)


def test_several_runs_follow_one_another_and_each_member_is_scored_as_it_passes(store):
    runs = [Predictions(store, Linear(), None, X), Predictions(store, Linear(), None, X, last=1)]
    scored = Scored(runs, LABELS)
    assert scored.scores == {}
    assert [member.index for member in scored.members] == [1, 3, 3]
    for position, (values, index) in enumerate(zip(scored, [1, 3, 3], strict=True)):
        np.testing.assert_allclose(values, own_prediction(store, index), rtol=1e-12)
        assert scored.scores[position] == pytest.approx(score(own_prediction(store, index), LABELS))
    assert len(scored) == len(scored.scores) == 3


@given(logits=arrays(np.float32, (5, 4), elements=st.floats(-1e4, 1e4, width=32)))
@settings(deadline=None)
def test_probabilities_are_the_softmax_in_float64_however_large_the_logits(logits):
    found = probabilities(logits)
    assert found.dtype == np.float64
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found, powers / powers.sum(axis=1, keepdims=True), rtol=1e-12, atol=1e-300)
