"""The example runs as it is, from anywhere, and shows what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

from snapcore.store import SnapshotStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensorflow_loop.py"


def run_example(folder, *arguments):
    """Return the error in percent and the NLL of each row that the example prints, by the row's name."""
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^(.+): error (.+)%, NLL (.+)$", result.stdout, re.MULTILINE)
    return {name: (float(error), float(nll)) for name, error, nll in rows}


def test_it_gives_five_members_and_an_ensemble_and_a_second_time_keeps_the_first(tmp_path):
    rows = run_example(tmp_path)
    members = [rows[f"member {index}"] for index in range(1, 6)]
    assert rows["ensemble"][1] <= sum(nll for _, nll in members) / 5  # Jensen's inequality
    assert rows["ensemble"][0] < 5
    assert run_example(tmp_path, "runs/tensorflow_loop") == rows
    for name in ("tensorflow_loop", "tensorflow_loop.1"):
        store = SnapshotStore(tmp_path / "runs" / name)
        assert (len(store.members), store.stopped) == (5, "finished")
        store.verify()


def test_the_loop_uses_snapcore_in_three_lines_only():
    lines = EXAMPLE.read_text().split("optimizer.build", 1)[1].splitlines()
    ours = [line for line in lines if re.search(r"Snapshot|\brun\.", line)]
    assert [line.split("# snapcore ")[1][0] for line in ours] == ["1", "2", "3"]
