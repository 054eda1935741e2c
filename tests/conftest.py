"""A framework that SNAPCORE_REQUIRE names must be there: one that cannot be imported fails the run."""

import os
import subprocess
import sys

import pytest


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # the process that started this one has looked
        return
    for name in filter(None, os.environ.get("SNAPCORE_REQUIRE", "").split(",")):
        # In a process of its own: frameworks begin threads, and processes with threads are not to be forked.
        code = f"from snapcore.backend import load_backend; print(load_backend({name!r}).about())"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if found.returncode:
            raise pytest.UsageError(f"SNAPCORE_REQUIRE names {name}: {found.stderr.strip().splitlines()[-1]}")
