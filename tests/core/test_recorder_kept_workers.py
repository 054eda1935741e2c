"""A loader that draws only when it is first walked makes a resumed run another one: told before the first batch."""

import random
import sys
import warnings
from types import SimpleNamespace

import pytest

from .test_recorder_epochs import Run, Shuffled


class DataLoader:
    """PyTorch's, as far as it matters here."""

    def __init__(self, kept=True, generator=None, begun=False):
        self.persistent_workers, self.generator = kept, generator
        self._iterator = object() if begun else None

    def __iter__(self):
        return iter(Shuffled())


class Wrapped:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


@pytest.fixture(autouse=True)
def torch_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.data", SimpleNamespace(DataLoader=DataLoader))


@pytest.mark.parametrize("walk", ["batches", "epochs_of"])
def test_one_that_nobody_has_walked_yet_is_told_of_before_the_first_batch(tmp_path, walk):
    run, evaluating = Run(tmp_path), DataLoader()
    with pytest.warns(UserWarning, match="generator=torch.Generator") as told:
        getattr(run.recorder, walk)(Shuffled())
    assert len(told) == 1
    assert run.recorder.cursor.step == 0
    assert evaluating is not None


def test_the_warning_points_at_the_loop(tmp_path):
    run, evaluating = Run(tmp_path), DataLoader()
    walk = run.recorder.batches
    adapters_own = {"__name__": "snapcore_somewhere", "walk": walk, "loader": Shuffled()}
    exec("def batches():\n    return walk(loader)\n", adapters_own)
    with pytest.warns(UserWarning, match="DataLoader") as told:
        adapters_own["batches"]()
    assert told[0].filename == __file__
    assert evaluating is not None


def quiet(run, loader):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.recorder.batches(loader)


@pytest.mark.parametrize(
    "other",
    [{"kept": False}, {"generator": random.Random(0)}, {"begun": True}],
    ids=["workers anew", "a generator of its own", "walked before the run"],
)
def test_others_are_not_told_of(tmp_path, other):
    run, evaluating = Run(tmp_path), DataLoader(**other)
    quiet(run, Shuffled())
    assert evaluating is not None


def test_the_one_that_is_trained_on_is_not_told_of_though_it_is_wrapped(tmp_path):
    run = Run(tmp_path)
    quiet(run, Wrapped(Wrapped(DataLoader())))


def test_a_loader_whose_constructor_is_still_running_is_left_alone(tmp_path):
    run, unfinished = Run(tmp_path), object.__new__(DataLoader)
    quiet(run, Shuffled())
    assert unfinished is not None


def test_without_pytorch_nothing_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.data")
    run, evaluating = Run(tmp_path), DataLoader()
    quiet(run, Shuffled())
    assert evaluating is not None
