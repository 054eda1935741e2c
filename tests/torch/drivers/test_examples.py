"""The examples with trainers, killed by the system in the middle and started again, show what they say."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from snapcore.store import SnapshotStore

EXAMPLES = Path(__file__).parents[3] / "examples"
KILLER = """
import importlib, os, runpy, signal, sys

_, module, hook, step, example, *sys.argv[1:] = sys.argv
callback = importlib.import_module(module).SnapshotCallback
original = getattr(callback, hook)


def dying(self, *args, **kwargs):
    original(self, *args, **kwargs)
    if self._run.updates == int(step):
        self._run.position()  # the members so far are on disk
        os.kill(os.getpid(), signal.SIGKILL)


setattr(callback, hook, dying)
runpy.run_path(example, run_name="__main__")
"""


def start(folder, *command):
    return subprocess.run(
        [sys.executable, *command, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "module", "hook", "kill", "members"),
    [
        ("lightning_fit", "snapcore_torch.lightning", "on_train_batch_end", 550, [174, 348, 522, 696, 870]),
        ("transformers_trainer", "snapcore_torch.transformers", "on_step_end", 245, [120, 240, 360, 480]),
    ],
)
def test_killed_after_a_member_that_the_checkpoint_does_not_count_it_takes_the_same_member_again(
    tmp_path, name, module, hook, kill, members
):
    """The last checkpoints are those after updates 464 and 200."""
    example = str(EXAMPLES / f"{name}.py")
    died = start(tmp_path, "-c", KILLER, module, hook, str(kill), example)
    assert died.returncode == -signal.SIGKILL, died.stderr
    before = SnapshotStore(tmp_path / "members").members
    assert [member.step for member in before] == [step for step in members if step <= kill]

    again = start(tmp_path, example)
    assert again.returncode == 0, again.stderr
    store = SnapshotStore(tmp_path / "members")
    store.verify()
    assert ([member.step for member in store.members], store.stopped) == (members, "finished")
    assert store.members[: len(before)] == before  # to the digests

    rows = re.findall(r"^(.+): error (.+)%, NLL (.+)$", again.stdout, re.MULTILINE)
    losses = [float(nll) for title, _, nll in rows if title != "ensemble"]
    assert float(rows[-1][2]) <= sum(losses) / len(losses)  # Jensen's inequality


@pytest.mark.parametrize("name", ["lightning_fit", "transformers_trainer"])
def test_an_example_uses_snapcore_in_three_lines_only(name):
    lines = (EXAMPLES / f"{name}.py").read_text().split("directory = Path", 1)[1].splitlines()
    ours = [line for line in lines if re.search(r"Snapshot|CosineCycles", line)]
    assert len(ours) == 3
