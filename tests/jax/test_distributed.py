"""Several processes train one model: one run directory, the members of a single process, and all resume together."""

import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from snapcore.store import SnapshotStore

from ..forked import Forked

pytestmark = pytest.mark.xdist_group("jax processes")  # what its tests share is made once
SCRIPT = Path(__file__).with_name("one_of_several.py")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(directory, layout, processes, ends=(), waits=None):
    """Start the processes and return how those in `waits` (all) have ended; the others are killed then.

    `ends` has a rank, an update, and the signal that this process then sends itself.
    """
    given = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "OMP_NUM_THREADS": "1"}
    words, logs, port = {rank: [update, name] for rank, update, name in ends}, directory.with_name("log"), free_port()
    logs.mkdir(exist_ok=True)
    running = [
        Forked(SCRIPT, directory, layout, port, processes, rank, *words.get(rank, []), log=logs / str(rank), **given)
        for rank in range(processes)
    ]
    try:
        return [running[rank].wait() for rank in waits or range(processes)]
    finally:
        for each in running:
            each.kill()
            print(each.errors)  # shown if the test fails


def members(directory):
    store = SnapshotStore(directory)
    assert store.stopped == "finished"
    return {member.step: store.load(member.index) for member in store.members}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys() == {40, 80, 120}
    for step, tensors in wanted.items():
        for name, array in tensors.items():
            np.testing.assert_allclose(found[step][name], array, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The members of a single process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    assert start(directory, "replicated", 1) == [0]
    return members(directory)


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_two_processes_write_one_run_with_the_members_of_a_single_process(tmp_path, layout, alone):
    """Users report that every process writes, or that arrays spread over several cannot be saved."""
    assert start(tmp_path / "run", layout, 2) == [0, 0]
    assert_close(members(tmp_path / "run"), alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "run"]


@pytest.mark.exhaustive
def test_when_one_is_asked_to_stop_all_leave_at_the_same_update_and_resume_together(tmp_path, alone):
    assert start(tmp_path / "run", "sharded", 2, [(1, 43, "SIGTERM")]) == [143, 143]
    assert [member.step for member in SnapshotStore(tmp_path / "run").members] == [40]
    assert start(tmp_path / "run", "sharded", 2) == [0, 0]
    assert_close(members(tmp_path / "run"), alone)


def test_when_one_is_killed_they_resume_from_the_resume_point_before_in_other_numbers_too(tmp_path, alone):
    assert start(tmp_path / "run", "sharded", 2, [(0, 57, "SIGKILL")], waits=[0]) == [-signal.SIGKILL]
    assert start(tmp_path / "run", "replicated", 1) == [0]
    assert_close(members(tmp_path / "run"), alone)
