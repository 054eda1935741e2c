"""The command is killed at random instants, as often as you like, and ends as if it never had been."""

import os
import random
import signal
import time

import pytest

from .conftest import AT_RANDOM
from .harness import ENDED, METHODS, SLOW, Spawned, assert_same, finished, place

RUNS = "runs"
KILLS = int(os.environ.get("SNAPCORE_KILLS", "10"))


def kill_and_start_again(launch, directory, length, kills, rng):
    """Kill the first starts of a run, each at an instant of an undisturbed run's length; return where they were."""
    places = []
    for _ in range(kills):
        process = launch(directory)
        time.sleep(rng.uniform(0, length))
        process.send(signal.SIGKILL)
        code = process.wait()
        if code == 0 or place(directory) == ENDED:  # it was faster
            return places
        assert code == -signal.SIGKILL, process.output
        places.append(place(directory))
    finished(launch(directory))
    return places


def trial(launch, folder, length, number, most=3):
    """Kill a run up to `most` times. Repeat until a kill has come before the end; return the run and the places."""
    (folder / SLOW).touch()
    rng, places, attempt = random.Random(number), [], 0
    while not places:
        attempt += 1
        directory = folder / f"run-{attempt}"
        places = kill_and_start_again(launch, directory, length, rng.randint(1, most), rng)
    return directory, places


@pytest.mark.exhaustive(keep=3)
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_random_instants_ends_as_the_undisturbed_one(zygote, reference, tmp_path, note, number):
    """Asked for in ten repositories: nothing corrupt after a kill, no orphan temporary files."""
    method = METHODS[number % len(METHODS)]
    undisturbed = reference(method)
    directory, places = trial(lambda directory: zygote.start(directory, method), tmp_path, undisturbed.seconds, number)
    note(AT_RANDOM, RUNS, runs=1)
    for where in places:
        note(AT_RANDOM, where, kills=1)
    assert_same(directory, undisturbed.directory)


def spawned(directory):
    """Start the command as a user does, and come back when its imports are done."""
    process = Spawned(directory)
    process.begin()
    return process


@pytest.fixture(scope="module")
def spawned_length(tmp_path_factory, reference):
    """How long the command takes after its imports; what it makes is what the zygote's children make."""
    directory = tmp_path_factory.mktemp("spawned") / "run"
    (directory.parent / SLOW).touch()
    process = spawned(directory)
    began = time.monotonic()
    finished(process)
    length = time.monotonic() - began
    assert_same(directory, reference().directory)
    return length


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(max(KILLS // 10, 1)))
def test_the_command_line_killed_at_random_instants_ends_as_the_undisturbed_one(
    reference, spawned_length, tmp_path, note, number
):
    directory, places = trial(spawned, tmp_path, spawned_length, 1000 + number, most=1)
    note(AT_RANDOM, f"{RUNS} of python -m snapcore", runs=1)
    for where in places:
        note(AT_RANDOM, where, kills=1)
    assert_same(directory, reference().directory)
