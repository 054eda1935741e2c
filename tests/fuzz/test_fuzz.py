"""The first cases of `make fuzz`, and that it finds what it looks for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import snapcore.store.manifest
from snapcore.lab import history

from .attacks import ATTACKS
from .case import Runs

ROOT = Path(__file__).parents[2]
CASES = 4 * len(ATTACKS)


def fuzz(*arguments):
    """Run the command in a process of its own, whose memory it limits."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.fuzz", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def numbers(done):
    """Return what each row of the table counts: refused, read, failed."""
    found = re.findall(r"^.+?: .+? +(\d+) +(\d+) +(\d+) +\d+ ms$", done.stdout, re.MULTILINE)
    return [tuple(map(int, row)) for row in found]


def test_hostile_run_directories_are_refused_or_read_as_they_are():
    done = fuzz("--cases", CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [sum(row) for row in numbers(done)] == [4] * len(ATTACKS)
    assert not any(failed for _, _, failed in numbers(done))


def test_a_case_is_repeated_by_its_number():
    number = next(place for place, attack in enumerate(ATTACKS) if attack.how == "length of the header")
    done = fuzz("--seed", 7, "--case", number + len(ATTACKS))
    assert numbers(done) == [(1, 0, 0)], done.stdout + done.stderr


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def wrong(runs, name, how):
    """Do ten cases of an attack; return what is wrong."""
    number = next(place for place, attack in enumerate(ATTACKS) if (attack.name, attack.how) == (name, how))
    return [outcome.wrong for case in range(10) if (outcome := runs.attack(0, number + case * len(ATTACKS))).wrong]


def test_a_manifest_that_is_believed_without_its_digest_is_found(runs, monkeypatch):
    def unchecked(data):
        return {name: value for name, value in msgspec.json.decode(data).items() if name != "sha256"}

    assert not wrong(runs, "snapcore.json", "values")
    monkeypatch.setattr(snapcore.store.manifest, "unseal", unchecked)
    assert any("it read" in each for each in wrong(runs, "snapcore.json", "values"))


def test_an_error_that_is_not_ours_is_found(runs, monkeypatch):
    monkeypatch.setattr(history, "_read", lambda path, rate: path.read_text().splitlines()[50])
    assert any("IndexError" in each for each in wrong(runs, "history.csv", "truncated"))


def test_a_reader_that_writes_beside_the_run_is_found(runs, monkeypatch):
    monkeypatch.setattr(history, "_read", lambda path, rate: [(path.parents[1] / "mine").write_text("")][1:])
    assert any("beside the run" in each for each in wrong(runs, "history.csv", "truncated"))
