"""What the tests of the application share: the command, run in this process or another, and a model that stops."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from snapcore.lab.cli import run

PATHS = [str(Path(path).absolute()) for path in sys.path]  # before any test changes the directory
SHORT = ("--model", "mlp", "--epochs", "3", "--cycles", "3")  # 63 updates, members after 21, 42 and 63

STOPPING = """
import os, signal
from snapcore_torch.models import mlp
from torch import nn

class Net(nn.Module):
    \"\"\"The built-in perceptron, which ends the run in update STOP_AT in the way that STOP_HOW says.\"\"\"

    def __init__(self, input_shape, n_classes):
        super().__init__()
        self.layers, self.updates = mlp(input_shape, n_classes), 0

    def forward(self, x):
        self.updates += self.training
        if self.training and self.updates == int(os.environ.get("STOP_AT", 0)):
            if os.environ["STOP_HOW"] == "ctrl-c":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.Signals[os.environ["STOP_HOW"]])
        return self.layers(x)
"""


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def refusal(self):
        """The one plain line of an error."""
        assert "Traceback" not in self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("snapcore: ")
        return self.err.strip()


@pytest.fixture(autouse=True)
def single_threaded():
    torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, and the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(here, capsys):
    """Run `snapcore …` in this process and an empty folder."""

    def call(*words):
        capsys.readouterr()
        code = run([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def python(here, models):
    """Run `python …` in another process, in the same folder and with the same packages."""

    def call(*words, **variables):
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"},  # JAX sets it
            "PYTHONPATH": os.pathsep.join([str(models), *PATHS]),
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=120,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with the module `stopping`."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "stopping.py").write_text(STOPPING)
    return folder


@pytest.fixture
def stopping(models, monkeypatch):
    """Tell the model `stopping:Net` in which of its updates to stop, and how."""
    monkeypatch.syspath_prepend(models)

    def at(update, how="ctrl-c"):
        monkeypatch.setenv("STOP_AT", str(update or 0))
        monkeypatch.setenv("STOP_HOW", how)

    at(None)
    return at


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The directory of a finished run; read it, and leave it as it is."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("lab") / "finished"
    assert run(["train", *SHORT, "--output", str(directory)]) == 0
    return directory


@pytest.fixture(scope="session")
def other_seed(tmp_path_factory):
    """The same, of another seed."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("lab") / "other_seed"
    assert run(["train", *SHORT, "--seed", "1", "--output", str(directory)]) == 0
    return directory


def scores_of(results):
    """Results without what depends on who computed them, and the digest of all of it."""
    return {name: value for name, value in results.items() if name not in {"seconds", "threads", "sha256"}}


def copy_of(run, where):
    """Copy a run without its predictions, so that its members are run again."""
    return Path(shutil.copytree(run, where, ignore=shutil.ignore_patterns("predictions")))


@pytest.fixture
def results():
    """Read `results.json`, and check what holds of any: its schema, and Jensen's inequality."""

    def read(directory):
        found = json.loads((directory / "results.json").read_text())
        check_schema(found)
        check_jensen(found)
        return scores_of(found)

    return read


SCORES = {"error": 100, "nll": 709, "brier": 2, "ece": 1}


def check_schema(found):
    names = {
        **{"backend": str, "data": str, "model": str, "method": str, "task": str, "loss": str},
        **{"updates": int, "seconds": float, "threads": int},
    }
    assert list(found) == [*names, "members", "ensemble", "sha256"]
    for name, kind in names.items():
        assert type(found[name]) is kind, name
    assert found["seconds"] > 0
    assert found["threads"] > 0
    for member in found["members"]:
        assert list(member) == ["index", "step", "lr", *SCORES]
        assert type(member["index"]) is type(member["step"]) is int
        assert type(member["lr"]) is float
    assert [row["m"] for row in found["ensemble"]] == list(range(1, len(found["members"]) + 1))
    for row in found["ensemble"]:
        assert list(row) == ["m", *SCORES]
    for row in [*found["members"], *found["ensemble"]]:
        for name, most in SCORES.items():
            assert type(row[name]) is float
            assert 0 <= row[name] <= most


def check_jensen(found):
    """-log is convex: the NLL of a mean is at most the mean of the NLLs."""
    losses = [member["nll"] for member in found["members"]]
    for row in found["ensemble"]:
        last = losses[-row["m"] :]
        assert row["nll"] <= sum(last) / len(last) + 1e-12


@pytest.fixture
def tensors_of():
    """The bytes of a run's members, by file."""

    def read(directory):
        files = sorted(directory.glob("snapshot-*.safetensors"))
        assert files
        return {file.name: file.read_bytes() for file in files}

    return read
