"""The same kills for frameworks that run threads, through the true command line: nothing with threads is forked."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from .conftest import AT_RANDOM
from .harness import ENDED, assert_same, environment, place

BACKENDS = ("jax", "keras", "tensorflow")
JOB = "--data digits --model mlp --train-limit 640 --epochs 60 --cycles 3 --batch-size 32 --resume-every 20"
KILLS = int(os.environ.get("SNAPCORE_KILLS", "5"))


def start(backend, directory):
    command = [sys.executable, "-m", "snapcore", "train", "--backend", backend, *JOB.split(), "--output", directory]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def began(process):
    """Wait until training begins: frameworks have their say before."""
    for line in process.stdout:
        if line.startswith("snapshot on digits"):
            return time.monotonic()
    pytest.fail(f"training did not begin: {process.wait()}")


def finish(process):
    printed = process.communicate()[0]
    assert process.returncode == 0, printed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By backend, an undisturbed run, and how long its training takes."""
    found = {}

    def of(backend):
        if backend not in found:
            directory = tmp_path_factory.mktemp(backend) / "run"
            process = start(backend, directory)
            beginning = began(process)
            finish(process)
            found[backend] = directory, time.monotonic() - beginning
        return found[backend]

    return of


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(max(KILLS // 5, 1)))
@pytest.mark.parametrize("backend", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in BACKENDS])
def test_a_run_killed_at_a_random_instant_ends_as_the_undisturbed_one(undisturbed, tmp_path, note, backend, number):
    reference, length = undisturbed(backend)
    rng, where, attempt = random.Random(number), ENDED, 0
    while where == ENDED:  # until a kill has come before the end
        attempt += 1
        directory = tmp_path / f"run-{attempt}"
        process = start(backend, directory)
        began(process)
        time.sleep(rng.uniform(0, length))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        where = place(directory)
        length /= 2  # if it came too late: the undisturbed run may have shared the machine with more than this one
    note(AT_RANDOM, f"runs of the {backend} backend", runs=1, kills=1)
    finish(start(backend, directory))
    assert_same(directory, reference)
