"""Disks that take their time: a run that is ended while its writer waits is another's once nothing is written."""

import os
import random
import signal
import time

import pytest

from snapcore.store import SnapshotStore

from .conftest import SLOW_DISK
from .harness import ENDED, Fault, arguments, assert_same, finished, place, wait_for
from .sabotage import STALL

RUNS = max(int(os.environ.get("SNAPCORE_KILLS", "1")) // 2, 1)
LEFT = 130
IN_USE = "/run is being written by another run; wait for it, or choose another\n"
FILES = {"member 2": "snapshot-002", "a resume point": "point", "the manifest": "snapcore.json"}


def refused(zygote, tmp_path):
    """Start a second writer; return whether it was told that there is one."""
    second = zygote.command(arguments(tmp_path / "run"), tmp_path / "second")
    return second.wait() == 1 and second.output.endswith(IN_USE)


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("call", ["os:fsync", "os:replace"])
def test_who_presses_ctrl_c_twice_while_a_file_is_written_keeps_the_run_until_it_is(zygote, reference, tmp_path, call):
    directory = tmp_path / "run"
    child = zygote.start(directory, fault=Fault(call, "STALL", match="snapshot-002"))
    wait_for(tmp_path / STALL)
    for _ in range(2):
        child.send(signal.SIGINT)
        assert refused(zygote, tmp_path)
    assert [member.index for member in SnapshotStore(directory).members] == [1]
    (tmp_path / STALL).unlink()
    assert child.wait() == LEFT, child.output
    assert [member.index for member in SnapshotStore(directory).members] == [1, 2]
    finished(zygote.start(directory))
    assert_same(directory, reference().directory)


def test_who_is_killed_while_a_file_is_written_frees_the_run_at_once(zygote, reference, tmp_path):
    directory = tmp_path / "run"
    child = zygote.start(directory, fault=Fault("os:fsync", "STALL", match="snapshot-002"))
    wait_for(tmp_path / STALL)
    assert refused(zygote, tmp_path)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    (tmp_path / STALL).unlink()
    finished(zygote.start(directory))
    assert_same(directory, reference().directory)


@pytest.mark.parametrize("number", range(RUNS))
@pytest.mark.parametrize("end", ["killed", "interrupted twice"])
def test_a_run_on_a_slow_disk_ends_as_the_undisturbed_one_whatever_has_ended_it(
    zygote, reference, tmp_path, note, end, number
):
    """A second start comes while the first is being ended: it is refused, or takes over; never do two write."""
    rng, directory = random.Random(f"{end} {number}"), tmp_path / "run"
    name = rng.choice([*FILES])
    slow = Fault("os:fsync", "SLOW", match=FILES[name], count=2, always=name == "member 2")
    child = zygote.start(directory, fault=slow)
    time.sleep(rng.uniform(0, 1.5))
    for _ in range(2):
        child.send(signal.SIGKILL if end == "killed" else signal.SIGINT)
        time.sleep(rng.choice((0, 0.01)))
    second = zygote.command(arguments(directory), tmp_path / "second")
    codes = child.wait(), second.wait()
    assert codes[0] in (0, LEFT, -signal.SIGKILL), child.output
    assert codes[1] == 0 or second.output.endswith(IN_USE) or "holds a run that is finished" in second.output
    note(SLOW_DISK, f"{end}, {name} slow", runs=1, **{"second refused": int(codes[1] != 0)})
    if place(directory) != ENDED:
        finished(zygote.start(directory))
    assert_same(directory, reference().directory)
