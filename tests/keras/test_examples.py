"""The example runs as it is, from anywhere, on each of Keras' backends, and shows what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from snapcore.store import SnapshotStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_fit.py"
BACKENDS = ("tensorflow", "jax", "torch")
pytestmark = pytest.mark.xdist_group("keras examples")  # each is run once


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where each backend ran it, and the error in percent and the NLL of each row printed, by the row's name."""
    begun = {}
    for backend in BACKENDS:
        folder = tmp_path_factory.mktemp(backend)
        env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        begun[backend] = (
            folder,
            subprocess.Popen(
                [sys.executable, "-W", "error", "-W", "ignore:__array__:DeprecationWarning", str(EXAMPLE)],
                cwd=folder,
                env={**env, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
        )
    done = {}
    for backend, (folder, process) in begun.items():
        output, error = process.communicate()
        assert process.returncode == 0, f"{backend}: {error}"
        rows = re.findall(r"^(.+): error (.+)%, NLL (.+)$", output, re.MULTILINE)
        done[backend] = folder, {name: (float(error), float(nll)) for name, error, nll in rows}
    return done


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_gives_five_members_and_an_ensemble(runs, backend):
    folder, rows = runs[backend]
    members = [rows[f"member {index}"] for index in range(1, 6)]
    assert rows["ensemble"][1] <= sum(nll for _, nll in members) / 5  # Jensen's inequality
    assert rows["ensemble"][0] < 5
    store = SnapshotStore(folder / "runs" / "keras_fit")
    assert ([member.step for member in store.members], store.stopped) == ([174, 348, 522, 696, 870], "finished")
    store.verify()


def test_it_uses_snapcore_in_three_lines_only():
    lines = EXAMPLE.read_text().split("cycles=5)", 1)[1].splitlines()
    ours = [line for line in lines if "Snapshot" in line]
    assert [line.split("# snapcore ")[1][0] for line in ours] == ["1", "2", "3"]
