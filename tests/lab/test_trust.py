"""A run directory may come from anybody: evaluating it executes none of its code unless the caller says so outright."""

import json
import shutil

import pytest

from snapcore import DataError
from snapcore.lab.evaluate import evaluate
from snapcore.lab.sealed import read_sealed, write_sealed

CODE = """
open("executed", "w").close()
from snapcore_torch.models import mlp as net
"""


@pytest.fixture
def hostile(here, finished):
    """A run that names a function of a file that lies in it; it is the current directory too."""
    run = shutil.copytree(finished, here / "run")
    write_sealed(run / "job.json", {**read_sealed(run / "job.json"), "model": "in_the_run:net"})
    (run / "in_the_run.py").write_text(CODE)
    return run


@pytest.fixture
def inside(hostile, monkeypatch):
    monkeypatch.chdir(hostile)
    return hostile


def test_a_model_that_a_run_names_is_not_imported_and_the_line_says_what_would_be(inside, cli):
    done = cli("evaluate", ".")
    assert (done.code, done.out) == (1, "")
    assert "executed" in done.refusal
    assert "--model in_the_run:net" in done.refusal
    assert "--trust-model" in done.refusal
    assert not (inside / "executed").exists()


def test_neither_the_module_nor_the_command_imports_it(inside, python):
    code = "from snapcore.lab import main; main()"
    for words in (("-m", "snapcore"), ("-c", code)):
        assert python(*words, "evaluate", ".").code == 1
    assert not (inside / "executed").exists()


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize(
    ("start", "words"),
    [
        (["-m", "snapcore"], ["--trust-model"]),
        (["-c", "from snapcore.lab import main; main()"], ["--model", "in_the_run:net"]),
    ],
)
def test_it_is_imported_once_the_caller_says_so(start, words, inside, python, results, finished):
    assert python(*start, "evaluate", ".", *words).code == 0
    assert (inside / "executed").exists()
    assert results(inside)["members"] == results(finished)["members"]


@pytest.mark.parametrize("model", ["mlp", "in_the_run:other", "in_the_run", "os:system"])
def test_naming_another_model_is_no_permission(model, inside, cli):
    assert "got " + model in cli("evaluate", ".", "--model", model).refusal
    assert not (inside / "executed").exists()


def test_naming_the_model_of_one_run_is_no_permission_for_that_of_another(hostile, here, cli, finished):
    other = shutil.copytree(hostile, here / "other")
    write_sealed(other / "job.json", {**read_sealed(other / "job.json"), "model": "elsewhere:net"})
    message = cli("evaluate", hostile, other, "--model", "in_the_run:net").refusal
    assert str(other) in message
    assert "--model elsewhere:net" in message
    assert not (here / "executed").exists()


def test_a_function_that_is_installed_is_code_too(hostile, cli):
    write_sealed(hostile / "job.json", {**read_sealed(hostile / "job.json"), "model": "os:mkdir"})
    assert "os:mkdir" in cli("evaluate", hostile).refusal


def test_the_function_behind_the_command_asks_for_the_same(inside):
    with pytest.raises(DataError, match="would be executed"):
        evaluate([inside])
    assert not (inside / "executed").exists()


def test_built_in_models_need_no_permission(cli, finished, here):
    assert cli("evaluate", finished, "--output", "scores").code == 0
    assert cli("evaluate", finished, "--model", "mlp", "--output", "scores").code == 0


@pytest.mark.exhaustive
def test_files_in_the_current_directory_do_not_stand_in_for_what_the_command_imports(inside, python, finished):
    for module in ("msgspec", "numpy", "typer", "torch", "sklearn", "snapcore_torch", "csv", "tempfile"):
        (inside / f"{module}.py").write_text(CODE)
    assert python("-m", "snapcore", "inspect", ".").code == 0
    assert python("-m", "snapcore", "evaluate", finished, "--output", "scores").code == 0
    assert not (inside / "executed").exists()


def test_a_job_whose_digest_does_not_fit_names_no_model(inside, cli):
    job = json.loads((inside / "job.json").read_text())
    (inside / "job.json").write_text(json.dumps({**job, "model": "in_the_run:more"}))
    assert "job.json is damaged" in cli("evaluate", ".", "--trust-model").refusal
    assert not (inside / "executed").exists()


def test_training_does_not_import_what_a_run_in_its_directory_names(inside, cli):
    assert "in_the_run:net" in cli("train", "--model", "mlp", "--epochs", "3", "--cycles", "3", "--output", ".").refusal
    assert not (inside / "executed").exists()
