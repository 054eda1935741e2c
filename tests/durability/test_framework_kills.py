"""The same kills for the JAX backend, through the true command line: a process with JAX in it is not to be forked."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from .conftest import AT_RANDOM
from .harness import ENDED, assert_same, environment, place

JOB = "train --backend jax --data digits --model mlp --train-limit 640 --epochs 60 --cycles 3 --batch-size 32"
KILLS = int(os.environ.get("SNAPCORE_KILLS", "10"))


def start(directory):
    words = [*JOB.split(), "--resume-every", "20", "--output", str(directory)]
    command = [sys.executable, "-m", "snapcore", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def finish(process):
    printed = process.communicate()[0]
    assert process.returncode == 0, printed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """An undisturbed run, and how long it takes after its first line."""
    directory = tmp_path_factory.mktemp("jax") / "run"
    process = start(directory)
    process.stdout.readline()
    began = time.monotonic()
    finish(process)
    return directory, time.monotonic() - began


@pytest.mark.parametrize("number", range(max(KILLS // 5, 1)))
def test_a_jax_run_killed_at_a_random_instant_ends_as_the_undisturbed_one(undisturbed, tmp_path, note, number):
    reference, length = undisturbed
    rng, where, attempt = random.Random(number), ENDED, 0
    while where == ENDED:  # until a kill has come before the end
        attempt += 1
        directory = tmp_path / f"run-{attempt}"
        process = start(directory)
        process.stdout.readline()
        time.sleep(rng.uniform(0, length))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        where = place(directory)
    note(AT_RANDOM, "runs of the JAX backend", runs=1, kills=1)
    finish(start(directory))
    assert_same(directory, reference)
