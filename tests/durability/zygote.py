"""Start the `snapcore` command many times without waiting for imports: a process that has done them all, and forks.

A child is a process of its own with the command's own exit code, and is killed like any other. Requests come as lines
of JSON; each has one line of JSON for an answer.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import matplotlib.figure
import torch._dynamo  # the first update would import it
from sabotage import Fault, install

from snapcore.backend import load_backend
from snapcore.lab import main
from snapcore.lab.datasets import load_data


def prepare():
    """Import what the command imports only when it comes to it."""
    importlib.import_module("snapcore.lab.cli")
    load_backend("torch")
    load_data("digits")
    figure = matplotlib.figure.Figure(layout="constrained")
    figure.subplots().set_title("fonts are found")
    figure.savefig(io.BytesIO())
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"a process must have one thread to be forked, and this one has {threads}")
    gc.freeze()  # or every child would copy all of the memory when it looks for garbage


def serve(children):
    """Answer requests until there are no more; True in a child, which has become the command."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                children.discard(request["wait"])
            answer = {"stopped": os.WIFSTOPPED(status), "code": None}
            if not answer["stopped"]:
                answer["code"] = os.waitstatus_to_exitcode(status)
        else:
            child = os.fork()
            if child == 0:
                become(**request)
                return True
            children.add(child)
            answer = {"pid": child}
        print(json.dumps(answer), flush=True)
    return False


def become(arguments, folder, log, fault):
    atexit._clear()  # what the imports have registered takes time, and is not what is tested
    os.chdir(folder)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        *((n, log, os.O_WRONLY | os.O_APPEND) for n in (1, 2)),
    ):
        opened = os.open(path, flags | os.O_CREAT, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["snapcore", *arguments]
    if fault is not None:
        install(Fault(**fault))


if __name__ == "__main__":
    sys.stdout, answers = io.StringIO(), sys.stdout
    prepare()
    sys.stdout = answers
    print(json.dumps({"ready": torch.__version__}), flush=True)
    begun = set()
    if serve(begun):
        try:
            main()
        except SystemExit as end:
            with contextlib.suppress(KeyboardInterrupt):  # which Python would note, and leave all the same
                atexit._run_exitfuncs()  # such as the one that waits for the writer
            sys.stdout.flush()
            os._exit(end.code)  # taking the interpreter down would take as long as the run
    for left in begun:
        os.kill(left, signal.SIGKILL)
