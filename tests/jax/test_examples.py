"""The examples run as they are, from anywhere, and show what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from snapcore.store import SnapshotStore

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("jax_loop", "flax_nnx", "equinox_mlp")


def run_example(name, folder, *arguments):
    """Return the error in percent and the NLL of each row that the example prints, by the row's name."""
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^(.+): error (.+)%, NLL (.+)$", result.stdout, re.MULTILINE)
    return {name: (float(error), float(nll)) for name, error, nll in rows}


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("name", NAMES)
def test_it_gives_five_members_and_an_ensemble(name, tmp_path):
    rows = run_example(name, tmp_path)
    members = [rows[f"member {index}"] for index in range(1, 6)]
    assert rows["ensemble"][1] <= sum(nll for _, nll in members) / 5  # Jensen's inequality
    assert rows["ensemble"][0] < 5
    runs = [tmp_path / "runs" / name]
    if name == "jax_loop":  # a second time it gives the same, and keeps the first
        assert run_example(name, tmp_path, "runs/jax_loop") == rows
        runs.append(tmp_path / "runs" / "jax_loop.1")
    for run in runs:
        store = SnapshotStore(run)
        assert (len(store.members), store.stopped) == (5, "finished")
        store.verify()


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_uses_snapcore_in_three_lines_only(name):
    lines = (EXAMPLES / f"{name}.py").read_text().split("cycles=5)", 1)[1].splitlines()
    ours = [line for line in lines if re.search(r"Snapshot|\brun\.", line)]
    assert [line.split("# snapcore ")[1][0] for line in ours] == ["1", "2", "3"]
