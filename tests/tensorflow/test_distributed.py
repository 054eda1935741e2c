"""Several workers train one model: one run directory, the members of a single process, and all resume together."""

import json
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from snapcore import ProtocolError
from snapcore.store import SnapshotStore
from snapcore_tensorflow.distributed import TensorFlowGroup, current_group

from ..forked import Forked

pytestmark = pytest.mark.xdist_group("tensorflow workers")  # what its tests share is made once
SCRIPT = Path(__file__).with_name("one_of_several.py")


def free_ports(number):
    found = [socket.socket() for _ in range(number)]
    for each in found:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return ports


def start(directory, workers, ends=(), waits=None, chief=False):
    """Start the workers and return how those in `waits` (all) have ended, and what they said; others are killed then.

    `ends` has a rank, an update, and the signal that this worker then sends itself.
    """
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    cluster = {"chief": addresses[:1], "worker": addresses[1:]} if chief else {"worker": addresses}
    tasks = [(kind, number) for kind in cluster for number in range(len(cluster[kind]))]
    words = {rank: [update, name] for rank, update, name in ends}
    logs = directory.with_name("log")
    logs.mkdir(exist_ok=True)
    running = []
    for rank, (kind, number) in enumerate(tasks):
        config = json.dumps({"cluster": cluster, "task": {"type": kind, "index": number}})
        given = {"TF_CONFIG": config if workers > 1 else None, "OMP_NUM_THREADS": "1"}
        running.append(Forked(SCRIPT, directory, *words.get(rank, []), log=logs / str(rank), **given))
    try:
        awaited = [running[rank] for rank in waits or range(workers)]
        return [each.wait() for each in awaited], [each.output.splitlines()[-1:] for each in awaited]
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
    assert start(directory, 1)[0] == [0]
    return members(directory)


@pytest.mark.parametrize("chief", [False, True])
def test_two_workers_write_one_run_with_the_members_of_a_single_process(tmp_path, chief, alone):
    """Users report that every worker writes, and that Keras' own `fit` fails on several workers (keras #20585)."""
    codes, said = start(tmp_path / "run", 2, chief=chief)
    assert codes == [0, 0]
    assert said[0] == said[1]
    reported = json.loads(said[0][0])
    assert reported["updates"] == 120
    assert reported["heard"] == [{"längere": "Wörter"}, {"längere": "WörterWörter"}]
    assert_close(members(tmp_path / "run"), alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "run"]


def test_when_one_is_asked_to_stop_all_leave_at_the_same_update_and_resume_together(tmp_path, alone):
    assert start(tmp_path / "run", 2, [(1, 43, "SIGTERM")])[0] == [143, 143]
    assert [member.step for member in SnapshotStore(tmp_path / "run").members] == [40]
    assert start(tmp_path / "run", 2)[0] == [0, 0]
    assert_close(members(tmp_path / "run"), alone)


def test_when_one_is_killed_they_resume_from_the_resume_point_before_and_so_does_one_alone(tmp_path, alone):
    assert start(tmp_path / "run", 2, [(0, 57, "SIGKILL")], waits=[0])[0] == [-signal.SIGKILL]
    assert [member.step for member in SnapshotStore(tmp_path / "run").members] == [40]
    assert start(tmp_path / "run", 1)[0] == [0]
    assert_close(members(tmp_path / "run"), alone)


def test_a_process_alone_is_in_no_group():
    assert current_group(None) is None
    assert current_group(tf.distribute.get_strategy()) is None
    assert current_group(tf.distribute.OneDeviceStrategy("CPU:0")) is None


def test_a_group_is_of_a_strategy_of_several_workers():
    with pytest.raises(ProtocolError, match=r"MultiWorkerMirroredStrategy, and TF_CONFIG .* got a OneDeviceStrategy"):
        TensorFlowGroup(tf.distribute.OneDeviceStrategy("CPU:0"))
