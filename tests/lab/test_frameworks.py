"""The command on every framework, and ensembles whose members come from several of them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from snapcore.ensemble import Recipe
from snapcore.lab.cli import run
from snapcore.lab.datasets import load_data
from snapcore.metrics import nll

from .conftest import copy_of

pytestmark = pytest.mark.xdist_group("frameworks")  # the runs are made once
BACKENDS = ("torch", "jax", "keras", "tensorflow")
WORDS = ("--model", "mlp", "--epochs", "6", "--cycles", "2")  # 126 updates, members after 63 and 126


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A finished run of each backend, of one seed."""
    folder = tmp_path_factory.mktemp("frameworks")
    for backend in BACKENDS:
        assert run(["train", "--backend", backend, *WORDS, "--output", str(folder / backend)]) == 0
    return {backend: folder / backend for backend in BACKENDS}


def by_hand(file, images):
    """Return a perceptron's probabilities: three kernels and biases, in order; PyTorch's kernels lie transposed."""
    tensors = load_file(file)
    kernels = [tensors[name] for name in sorted(tensors) if tensors[name].ndim == 2]
    biases = [tensors[name] for name in sorted(tensors) if tensors[name].ndim == 1]
    x = images.reshape(len(images), -1)
    for layer, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        x = np.maximum(x, 0) if layer else x
        x = x @ (kernel.T if file.parent.name == "torch" else kernel) + bias
    powers = np.exp(x.astype(np.float64))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_writes_the_same_files_and_the_same_table(runs, results, backend):
    found = results(runs[backend])
    assert (found["backend"], found["updates"]) == (backend, 126)
    assert [member["step"] for member in found["members"]] == [63, 126]
    assert [row["m"] for row in found["ensemble"]] == [1, 2]
    assert {file.name for file in runs[backend].iterdir()} >= {
        *("snapcore.json", "job.json", "history.csv", "training.png", "results.json"),
        *("snapshot-001.safetensors", "snapshot-002.safetensors"),
    }


def test_every_backend_takes_its_members_at_the_same_rates(runs, results):
    rates = {tuple(member["lr"] for member in results(runs[backend])["members"]) for backend in BACKENDS}
    assert len(rates) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_members_open_with_safetensors_alone_and_have_the_weights_of_one_architecture(runs, backend):
    tensors = load_file(runs[backend] / "snapshot-002.safetensors")
    shapes = sorted(tuple(sorted(array.shape)) for array in tensors.values())  # kernels lie transposed in PyTorch
    assert shapes == sorted([(64, 128), (128, 128), (10, 128), (128,), (128,), (10,)])


def test_one_ensemble_has_members_of_every_framework_and_is_at_least_as_likely_as_they_are(runs, cli, here, results):
    directories = [str(runs[backend]) for backend in ("torch", "jax", "tensorflow", "keras")]
    done = cli("evaluate", *directories, "--last", "1", "--output", "scores")
    assert done.code == 0
    found = results(here / "scores")
    assert found["backend"] == "torch+jax+tensorflow+keras"
    losses = [member["nll"] for member in found["members"]]
    assert losses == [results(runs[name])["members"][-1]["nll"] for name in ("torch", "jax", "tensorflow", "keras")]
    assert found["ensemble"][-1]["nll"] <= np.mean(losses)


def test_a_mixed_ensemble_is_the_mean_of_what_each_framework_predicts(runs, cli, here, results):
    """The members are evaluated here by NumPy, from their files."""
    data = load_data("digits")
    mean = np.mean([by_hand(runs[name] / "snapshot-002.safetensors", data.x_test) for name in BACKENDS], axis=0)
    assert cli("evaluate", *map(runs.get, BACKENDS), "--last", "1", "--output", "scores").code == 0
    assert results(here / "scores")["ensemble"][-1]["nll"] == pytest.approx(nll(mean, data.y_test), rel=1e-5)


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize(("first", "second"), [("torch", "torch"), ("jax", "jax"), ("torch", "jax")])
def test_a_framework_is_imported_only_if_a_run_is_of_it(runs, python, here, first, second):
    code = (
        "import json, sys; from snapcore.lab.cli import run; code = run(sys.argv[1:]); "
        "print(json.dumps([code, [name for name in ('torch', 'jax', 'keras', 'tensorflow') if name in sys.modules]]))"
    )
    copies = [copy_of(runs[name], here / f"{name}{number}") for number, name in enumerate((first, second))]
    for expected in (sorted({first, second}), []):  # the second time what they predict is kept
        done = python("-c", code, "evaluate", *copies, "--output", "scores")
        exit_code, imported = json.loads(done.out.splitlines()[-1])
        assert exit_code == 0
        assert sorted(imported) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_learns_a_mean_and_a_variance_and_leaves_a_recipe(backend, cli, here):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 4))
    y = x[:, 0] + 0.2 * rng.normal(size=300)
    np.savez(here / "mine.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:])
    data = ("--data", "mine", "--data-dir", "mine.npz", "--loss", "gaussian-nll", "--held-out", "0.2", "--recipe")
    words = (
        "--model",
        "mlp",
        "--epochs",
        "20",
        "--cycles",
        "2",
        "--batch-size",
        "20",
        "--optimizer",
        "adamw",
        "--lr",
        "0.01",
    )
    assert cli("train", "--backend", backend, *data, *words, "--output", "run").code == 0
    last = json.loads((here / "run" / "results.json").read_text())["ensemble"][-1]
    assert last["rmse"] < 0.6 * y[200:].std()
    assert last["nll"] < 0.5 * np.log(2 * np.pi * np.e * y[200:].var())  # what a constant mean and variance cost
    assert Recipe.open(here / "run" / "recipe.json").temperature == 1.0


def test_a_run_of_one_framework_is_not_resumed_in_another(runs, cli):
    for name in ("keras", "torch"):
        refusal = cli("train", "--backend", name, *WORDS, "--output", runs["jax"]).refusal
        assert str(runs["jax"]) in refusal


def test_the_list_of_backends_names_each_with_its_version_and_device(cli):
    import jax
    import keras
    import tensorflow
    import torch

    lines = dict(line.split(": ", 1) for line in cli("backends").out.splitlines())
    assert list(lines) == sorted(BACKENDS)
    assert lines["jax"].startswith(f"jax {jax.__version__} on ")
    assert lines["keras"] == f"keras {keras.__version__} on tensorflow"
    assert lines["tensorflow"].startswith(f"tensorflow {tensorflow.__version__} on ")
    assert lines["torch"].startswith(f"torch {torch.__version__} on ")
