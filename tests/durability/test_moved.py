"""A run whose directory was moved or deleted, and another run that has begun at its name: neither harms the other."""

import os
import random
import shutil
import signal
import time

import pytest

from snapcore.store import read_point

from .conftest import MOVED
from .harness import HOLD, SLOW, arguments, assert_same, finished, place, wait_for

RUNS = max(int(os.environ.get("SNAPCORE_KILLS", "2")) // 2, 1)
NOTICED = "was moved, deleted or replaced while this run had it open; start again"
ENDS = {"left to notice": None, "asked to stop": signal.SIGTERM, "interrupted": signal.SIGINT}


def moved(directory):
    return directory.rename(directory.with_name("moved"))


def deleted(directory):
    shutil.rmtree(moved(directory))


def wait_for_update_11(directory):
    """There training waits, and its resume point of update 10 is on disk."""
    while (point := read_point(directory)) is None or point.state["place"]["step"] < 10:
        time.sleep(0.005)


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize(("happen", "end"), [*((moved, end) for end in ENDS), (deleted, "left to notice")])
def test_a_run_that_has_lost_its_directory_leaves_the_run_at_its_name_alone(zygote, reference, tmp_path, happen, end):
    """The second ends while the first is in its eleventh update, which then goes on to the next resume point."""
    directory = tmp_path / "run"
    (tmp_path / HOLD).touch()
    first = zygote.start(directory)
    wait_for_update_11(directory)
    happen(directory)
    (tmp_path / "elsewhere").mkdir()
    second = zygote.command(arguments(directory, "star"), tmp_path / "elsewhere" / "second")
    finished(second)
    if ENDS[end] is not None:
        first.send(ENDS[end])
    (tmp_path / HOLD).unlink()
    assert first.wait() == 1, first.output
    assert NOTICED in first.output.splitlines()[-1]
    assert_same(directory, reference("star").directory)
    if happen is moved:
        finished(zygote.start(tmp_path / "moved"))
        assert_same(tmp_path / "moved", reference().directory)


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("number", range(RUNS))
@pytest.mark.parametrize("happen", [moved, deleted])
def test_two_runs_of_one_name_end_as_undisturbed_ones_whenever_the_first_was_moved_and_killed(
    zygote, reference, tmp_path, note, happen, number
):
    rng, directory = random.Random(f"{happen.__name__} {number}"), tmp_path / "run"
    length = reference().seconds
    reference("singlecycle")
    (tmp_path / SLOW).touch()
    first = zygote.start(directory)
    wait_for(directory)
    time.sleep(rng.uniform(0, 0.8 * length))
    where = place(directory)
    happen(directory)
    second = zygote.command(arguments(directory, "singlecycle"), tmp_path / "second")
    time.sleep(rng.uniform(0, 0.5 * length))
    first.send(signal.SIGKILL)
    assert first.wait() in (1, -signal.SIGKILL, 0), first.output
    finished(second)
    note(MOVED, f"{happen.__name__}, {where}", runs=1)
    assert_same(directory, reference("singlecycle").directory)
    if happen is moved and not (tmp_path / "moved" / "results.json").exists():
        finished(zygote.start(tmp_path / "moved"))
        assert_same(tmp_path / "moved", reference().directory)
