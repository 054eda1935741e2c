"""What all tests share: the frameworks that SNAPCORE_REQUIRE names must be there, or the run fails."""

import collections
import gc
import os
import signal
import subprocess
import sys

import pytest


def pytest_configure(config):
    # A process that a shell has started in the background ignores Ctrl-C, and so would all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):  # the process that started this one has looked
        return
    names = [*filter(None, os.environ.get("SNAPCORE_REQUIRE", "").split(","))]
    looks = {name: look_for(name) for name in names}
    errors = {name: look.communicate()[1] for name, look in looks.items()}  # all of them, whatever the first has found
    for name, look in looks.items():
        if look.returncode:
            raise pytest.UsageError(f"SNAPCORE_REQUIRE names {name}: {errors[name].strip().splitlines()[-1]}")


def pytest_collection_modifyitems(config, items):
    """Leave out what `make exhaustive` runs, unless SNAPCORE_EXHAUSTIVE asks for it: `only` for that, `1` for all.

    `@pytest.mark.exhaustive` marks a test that says again at length what a shorter one says too: on another backend,
    with more seeds, by real kills. With `keep=n` the first n of its cases stay.
    """
    # Taken away, since some tests run pytest themselves.
    asked = os.environ.pop("SNAPCORE_EXHAUSTIVE", "1" if "SNAPCORE_KILLS" in os.environ else "")
    if asked not in ("", "1", "only"):
        raise pytest.UsageError(f"SNAPCORE_EXHAUSTIVE must be 1 or only, got {asked}")
    seen = collections.Counter()
    parts = {True: [], False: []}
    for item in items:
        mark, name = item.get_closest_marker("exhaustive"), item.nodeid.partition("[")[0]
        seen[name] += 1
        parts[mark is not None and seen[name] > mark.kwargs.get("keep", 0)].append(item)
    left_out = {"": parts[True], "1": [], "only": parts[False]}[asked]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = parts[asked == "only"]


def look_for(name):
    """Begin a process that imports it: frameworks begin threads, and processes with threads are not to be forked."""
    code = f"from snapcore.backend import load_backend; load_backend({name!r}).about()"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def pytest_collection_finish():
    """Have the garbage collector leave the frameworks alone: to look through their objects takes it seconds."""
    gc.freeze()
