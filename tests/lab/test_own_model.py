"""A model of the user's own that does not fit: one line that names it, and no half of a run is left."""

import pytest

from snapcore.lab.sealed import read_sealed, write_sealed
from snapcore.store import SnapshotStore

SHORT = ("--epochs", "3", "--cycles", "3")

MODELS = """
import torch
from torch import nn
from snapcore_torch.models import mlp

def no_arguments():
    return nn.Linear(64, 10)

def more_arguments(input_shape, n_classes, width):
    return mlp(input_shape, n_classes)

def no_module(input_shape, n_classes):
    return "a module"

def nothing(input_shape, n_classes):
    return None

def too_few_classes(input_shape, n_classes):
    return mlp(input_shape, 3)

def one_number_each(input_shape, n_classes):
    return nn.Sequential(nn.Flatten(0), nn.Linear(1, 1))

def wrong_input(input_shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(100, n_classes))

class Several(nn.Module):
    def __init__(self, input_shape, n_classes):
        super().__init__()
        self.layers = mlp(input_shape, n_classes)

    def forward(self, x):
        return self.layers(x), x

def needs_a_package(input_shape, n_classes):
    import no_such_package

def needs_a_file(input_shape, n_classes):
    return open("no such file")

def asserts(input_shape, n_classes):
    assert n_classes == 1000, "only\\nfor ImageNet"

class Raised(Exception):
    pass

def raises_its_own(input_shape, n_classes):
    raise Raised("not today \\x1b[31m")

class FailsInTraining(nn.Module):
    def __init__(self, input_shape, n_classes):
        super().__init__()
        self.layers, self.updates = mlp(input_shape, n_classes), 0

    def forward(self, x):
        self.updates += self.training
        if self.updates > LAST:
            raise RuntimeError("no more")
        return self.layers(x)

LAST = 0
"""
NAMES = [
    ("no_arguments", "TypeError"),
    ("more_arguments", "'width'"),
    ("no_module", "AttributeError"),
    ("nothing", "AttributeError"),
    ("too_few_classes", "its output must have shape (2, 10), images and classes, got (2, 3)"),
    ("one_number_each", "RuntimeError"),
    ("wrong_input", "RuntimeError"),
    ("Several", "Error"),
    ("needs_a_package", "No module named 'no_such_package'"),
    ("needs_a_file", "no such file"),
    ("asserts", "AssertionError: only; "),
    ("raises_its_own", r"Raised: not today \x1b[31m"),
    ("FailsInTraining", "RuntimeError: no more"),
]


@pytest.fixture
def own(here, monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / f"{folder.name}.py").write_text(MODELS)
    monkeypatch.syspath_prepend(folder)
    return folder.name


@pytest.mark.parametrize(("name", "cause"), NAMES)
def test_a_model_that_does_not_fit_is_one_line_and_leaves_nothing_behind(name, cause, own, cli, here):
    done = cli("train", *SHORT, "--model", f"{own}:{name}", "--output", "run")
    assert done.code == 1
    line = done.err.splitlines()[-1]
    assert line.startswith(f"snapcore: --model {own}:{name} ")
    assert cause in line
    assert line.isprintable()
    assert "Traceback" not in done.err
    assert list(here.iterdir()) == []


def test_a_directory_that_was_there_before_stays_with_what_is_in_it(own, cli, here):
    (here / "run").mkdir()
    (here / "run" / "notes.txt").write_text("precious")
    assert cli("train", *SHORT, "--model", f"{own}:FailsInTraining", "--output", "run").code == 1
    assert [path.name for path in (here / "run").iterdir()] == ["notes.txt"]


def test_a_run_that_has_members_is_kept_when_its_model_fails(own, cli, here):
    import importlib

    importlib.import_module(own).LAST = 30
    done = cli("train", *SHORT, "--model", f"{own}:FailsInTraining", "--output", "run")
    assert done.err.splitlines()[-1].startswith(f"snapcore: --model {own}:FailsInTraining does not fit: RuntimeError")
    assert [member.step for member in SnapshotStore("run").members] == [21]


def test_debug_shows_where_a_model_fails(own, cli):
    done = cli("--debug", "train", *SHORT, "--model", f"{own}:wrong_input", "--output", "run")
    assert "mat1 and mat2 shapes cannot be multiplied" in done.err
    assert "Traceback" in done.err


def test_a_model_that_no_longer_fits_is_one_line_in_evaluate_too(own, cli, finished, here):
    import shutil

    run = shutil.copytree(finished, here / "run")
    write_sealed(run / "job.json", {**read_sealed(run / "job.json"), "model": f"{own}:too_few_classes"})
    assert "its output must have shape (2, 10)" in cli("evaluate", run, "--trust-model").refusal


def test_a_jax_model_that_does_not_fit_is_one_line_too(own, cli, here):
    done = cli("train", "--backend", "jax", *SHORT, "--model", f"{own}:no_arguments", "--output", "run")
    assert f"--model {own}:no_arguments does not fit: TypeError" in done.refusal
    assert list(here.iterdir()) == []
