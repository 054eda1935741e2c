"""What goes wrong in a child process, and where: a signal to itself, an error of the system, a full disk."""

import errno
import functools
import importlib
import itertools
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

ROOM = 10_000
"""Bytes that a file may have once the disk is full: enough for what the run says, too few for a member."""
SLOWNESS = 0.5
"""Seconds that a call takes on a slow disk."""
STALL = "stall"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Arguments:
        call: the function at which it does, as `module:name` or `module:Class.name`.
        act: the name of a signal or of an error, `FULL`, `SLOW`, or `STALL`, which makes a file of that name in the
            working directory and waits until somebody deletes it.
        match: only calls that have this text in their arguments; a file descriptor counts as its path.
        count: at which of those calls.
        after: once the call has returned, instead of before it.
        always: at that call and at all later ones.
    """

    call: str
    act: str = "SIGKILL"
    match: str = ""
    count: int = 1
    after: bool = False
    always: bool = False


def install(fault: Fault) -> None:
    """Put a function that has the fault in the place of the one it names."""
    module, _, path = fault.call.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    original, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        number = next(calls) if fault.match in _text(args) else 0
        now = number == fault.count or (fault.always and number > fault.count)
        if now and not fault.after:
            _act(fault.act)
        result = original(*args, **kwargs)
        if now and fault.after:
            _act(fault.act)
        return result

    setattr(owner, name, replacement)


def _text(args: tuple[object, ...]) -> str:
    return " ".join(
        str(arg) if type(arg) is not int else _path(arg) for arg in args if isinstance(arg, str | Path | int)
    )


def _path(descriptor: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except FileNotFoundError:  # a number that is none, or that another thread has just closed
        return ""


def _act(act: str) -> None:
    if act.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, act))
    elif act == "FULL":
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    elif act == "SLOW":
        time.sleep(SLOWNESS)
    elif act == "STALL":
        Path(STALL).touch()
        while Path(STALL).exists():
            time.sleep(0.005)
    else:
        number = getattr(errno, act)
        raise OSError(number, os.strerror(number))
