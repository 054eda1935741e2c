"""The backends as the command uses them: the first one installed, started quietly, and the threads it computes with."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from snapcore.backend import Backend, available_backends, load_backend
from snapcore.errors import BackendNotFoundError

_STARTED: dict[str, Backend[Any]] = {}
_PREFERRED = ("torch", "jax", "tensorflow", "keras")
# How TensorFlow's C++ notes what it found, before its own setting of a level is read.
_NOTE = re.compile(rb"WARNING: All log messages before absl::InitializeLog|[IW]\d{4} \d\d:\d\d:\d\d")


def start_backend(name: str) -> Backend[Any]:
    """Return the backend called `name`, importing its framework without the notes on its start.

    Raises:
        BackendNotFoundError: there is none, or its framework is not installed.
    """
    with _without_notes():
        _STARTED[name] = load_backend(name)
    return _STARTED[name]


def first_backend() -> tuple[str, Backend[Any]]:
    """Return the first backend whose framework is installed.

    Raises:
        BackendNotFoundError: none is; the message says what to install.
    """
    found = sorted(available_backends())
    ordered = [*(n for n in _PREFERRED if n in found), *(n for n in found if n not in _PREFERRED)]
    for name in ordered:
        try:
            return name, start_backend(name)
        except BackendNotFoundError:
            continue
    raise BackendNotFoundError("no framework is installed: pip install 'snapcore[torch]'")


def threads_of(name: str) -> int:
    """Return how many CPU threads a backend computes with: what it says, or all that this process may use.

    One that has not been started has computed nothing here, and is not started for this.
    """
    said: Callable[[], int | None] | None = getattr(_STARTED.get(name), "threads", None)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (said() if said else None) or usable


@contextmanager
def _without_notes() -> Iterator[None]:
    """Hold back what is written to file descriptor 2, and pass on all but notes.

    The notes come from C++, where Python's `sys.stderr` is not asked.
    """
    if sys.stderr is None:  # there is nobody to be spared
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held:
                if not _NOTE.match(line):
                    os.write(2, line)
