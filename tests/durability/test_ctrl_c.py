"""Ctrl-C at random instants: the first leaves with a resume point, the second at once, and no result changes."""

import os
import random
import re
import signal
import time

import pytest

from snapcore.store import SnapshotStore, read_point

from .conftest import INTERRUPTED
from .harness import ENDED, HOLD, METHODS, SLOW, assert_same, finished, place, wait_for

RUNS = int(os.environ.get("SNAPCORE_KILLS", "1"))
LEFT = 130
SAID = re.compile(r"left after (\d+) of 60 updates; it resumes after update (\d+)")


def interrupt(zygote, directory, method, length, times, rng):
    """Start a run and press Ctrl-C so many times at random; return its exit code and what it has said since."""
    before = log.stat().st_size if (log := directory.with_name(f"{directory.name}.log")).exists() else 0
    child = zygote.start(directory, method)
    time.sleep(rng.uniform(0, length))
    for _ in range(times):
        child.send(signal.SIGINT)
        time.sleep(rng.choice((0, 0.001, 0.02, 0.1)))
    code = child.wait()
    return code, child.output[before:]


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("number", range(RUNS))
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_a_run_interrupted_at_random_instants_ends_as_the_undisturbed_one(
    zygote, reference, tmp_path, note, times, number
):
    method, directory = METHODS[number % len(METHODS)], tmp_path / "run"
    undisturbed, rng = reference(method), random.Random(f"{times} {number}")
    (tmp_path / SLOW).touch()
    for _ in range(2):
        code, said = interrupt(zygote, directory, method, undisturbed.seconds, times, rng)
        assert code in (LEFT, 0, -signal.SIGINT), said  # the last as Python itself answers, once the command has ended
        where = place(directory)
        note(INTERRUPTED, f"{'once' if times == 1 else 'twice'}, {where}", interrupts=1)
        if times == 1 and (left := SAID.findall(said)):
            step, resumes = map(int, left[-1])
            assert step == resumes == read_point(directory).state["place"]["step"]
            assert [member.step for member in SnapshotStore(directory).members] == [20, 40][: step // 20]
        if where == ENDED:
            break
    (tmp_path / SLOW).unlink()
    if where != ENDED:
        finished(zygote.start(directory, method))
    assert_same(directory, undisturbed.directory)


def test_the_second_ctrl_c_ends_an_update_that_does_not_come_back(zygote, reference, tmp_path):
    directory = tmp_path / "run"
    (tmp_path / HOLD).touch()
    child = zygote.start(directory)
    wait_for(directory / "resume" / "point.safetensors")
    while not child.output.count("left after"):  # the first is only noted
        child.send(signal.SIGINT)
        time.sleep(0.05)
    assert child.wait() == LEFT, child.output
    assert (tmp_path / HOLD).exists()
    (tmp_path / HOLD).unlink()
    finished(zygote.start(directory))
    assert_same(directory, reference().directory)
