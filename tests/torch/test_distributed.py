"""Two processes under torchrun, on gloo: one run directory, and the members of a single process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from snapcore import ProtocolError
from snapcore.data import LOSSES
from snapcore.store import SnapshotStore
from snapcore_torch import TorchGroup
from snapcore_torch.distributed import current_group

pytestmark = pytest.mark.xdist_group("torchrun")  # what its tests share is made once
SCRIPT = Path(__file__).with_name("torchrun_script.py")


def torchrun(folder, *scenarios):
    """Start two processes; return whether they ended well, and what each left."""
    path = os.pathsep.join([*(entry for entry in sys.path if entry), str(Path.cwd())])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), str(folder)]
    ended = subprocess.run(
        [sys.executable, *command, *scenarios],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    results = [folder / f"{rank}.json" for rank in (0, 1)]
    left = [json.loads(file.read_text()) if file.exists() else {} for file in results]
    assert ended.returncode == 0 or scenarios[-1] in ("kill_loop", "kill_managed", "terminate"), ended.stderr[-5000:]
    return ended.returncode == 0, left


def load_script():
    """The same code in this process alone."""
    spec = importlib.util.spec_from_file_location("torchrun_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def members(directory):
    store = SnapshotStore(directory)
    assert store.stopped == "finished"
    store.verify()
    return [store.load(member.index) for member in store.members]


def assert_close(one, other):
    assert len(one) == len(other) == 3
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name, array in mine.items():
            np.testing.assert_allclose(array, theirs[name], atol=1e-5, err_msg=name)


def bits(directory):
    return [{name: array.tobytes() for name, array in tensors.items()} for tensors in members(directory)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def finished(folder):
    """All that runs to its end, in one start; then one that does not."""
    ended, results = torchrun(
        folder, "alike", "whole", "copies", "fresh", "refused", "gathered", "own_states", "kill_loop"
    )
    assert not ended
    return results


@pytest.fixture(scope="module")
def resumed(folder, finished):
    """Runs killed or terminated, and started again."""
    ends = [
        torchrun(folder, "resume", "kill_managed")[0],
        torchrun(folder, "resume_managed", "terminate")[0],
    ]
    before = len(SnapshotStore(folder / "terminated").members)
    ends.append(torchrun(folder, "resume_terminated")[0])
    return ends, before


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A single process with the same global batches."""
    directory, script = tmp_path_factory.mktemp("alone"), load_script()
    return directory, script.alike(directory)


@pytest.mark.parametrize("run", ["loop", "managed", "accumulated"])
def test_members_are_those_of_a_single_process_with_the_same_batches(folder, finished, alone, run):
    assert_close(members(folder / run), members(alone[0] / run))


def test_both_report_the_loss_of_the_whole_batch(finished, alone):
    assert finished[0]["losses"] == finished[1]["losses"]
    np.testing.assert_allclose(finished[0]["losses"], alone[1]["losses"], atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_of_each_kind_is_that_of_a_single_process(folder, finished, alone, loss):
    """Also where more labels are ignored in one process than in the other."""
    for run in (loss, f"{loss} accumulated"):
        assert_close(members(folder / run), members(alone[0] / run))
    assert finished[0][loss] == finished[1][loss]
    np.testing.assert_allclose(finished[0][loss], alone[1][loss], atol=1e-5)


def test_there_is_one_directory_with_each_member_once(folder, finished):
    store = SnapshotStore(folder / "loop")
    assert [(member.index, member.step) for member in store.members] == [(1, 8), (2, 16), (3, 24)]
    names = {path.name for path in (folder / "loop").glob("*.safetensors")}
    assert names == {f"snapshot-00{index}.safetensors" for index in (1, 2, 3)}


def test_names_are_those_of_the_model_without_its_wrapper(folder, finished):
    assert set(members(folder / "loop")[0]) == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_batch_statistics_are_those_of_process_0(folder, finished):
    """Nobody says whose they are; each process has its own."""
    mine, others = (result["running_means"] for result in finished)
    assert [tensors["2.running_mean"].tolist() for tensors in members(folder / "noisy")] == mine
    assert mine != others


def test_only_process_0_copies(finished):
    assert finished[0]["copied"] > 0
    assert finished[1]["copied"] == 0


def test_fresh_weights_are_the_same_in_both_without_a_seed(folder, finished):
    assert finished[0]["weights"] == finished[1]["weights"]
    last = members(folder / "fresh")[2]
    assert {name: array.tolist() for name, array in last.items()} == finished[0]["weights"]


@pytest.mark.parametrize("run", ["finished", "managed"])
def test_a_refusal_of_process_0_is_raised_in_both(finished, run):
    assert finished[0][run] == finished[1][run]
    assert "holds a run that is finished" in finished[0][run]
    assert finished[1][run].startswith("StoreError")


def test_a_batch_that_cannot_be_shared_is_refused(finished):
    for result in finished:
        assert result["batch"].startswith("DataError: batch_size must be a multiple of the 2 processes")


def test_sharded_weights_are_refused_before_anything_is_written(finished):
    for result in finished:
        assert result["sharded"].startswith(
            "DataError: the model's parameters are sharded over the processes (1.weight"
        )
        assert not result["written"]


def test_an_optimizer_that_shards_its_state_is_refused_in_both(folder, finished):
    for result in finished:
        assert result["zero"].startswith("ProtocolError: ZeroRedundancyOptimizer shards its state")
    assert not (folder / "zero").exists()


def test_each_process_gets_its_own_state_back(finished):
    for rank, result in enumerate(finished):
        assert result["own at 9"] == [0, 0, [0, 0]]
        assert result["own at 24"] == [9, 100 * rank + 8, [10 * rank] * 2]


def test_gathering_waits_for_all_and_orders_by_rank(finished):
    assert [(result["ranks"], result["waited"]) for result in finished] == [([0, 1], True)] * 2


@pytest.mark.parametrize(
    ("stopped", "never_stopped"),
    [("killed", "noisy"), ("killed managed", "managed noisy"), ("terminated", "long")],
)
def test_a_run_that_was_stopped_and_started_again_has_the_same_members(folder, resumed, stopped, never_stopped):
    """Dropout differs in each process, and comes back in each as it was."""
    assert bits(folder / stopped) == bits(folder / never_stopped)


def test_the_runs_were_stopped_indeed_and_resumed_where_they_were(folder, resumed):
    ends, members_at_termination = resumed
    assert ends == [False, False, True]
    assert members_at_termination == 0
    left = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert left == [{"terminated": 51}] * 2


def test_without_torchrun_a_process_is_alone():
    assert not torch.distributed.is_initialized()
    assert (current_group().rank, current_group().size) == (0, 1)
    with pytest.raises(
        ProtocolError, match=r"init_process_group\(\) before the run is opened; start them with torchrun"
    ):
        TorchGroup()
