"""The backends as the command uses them: the first that is installed, started quietly, and its threads."""

import os

import pytest

from snapcore import BackendNotFoundError
from snapcore.lab import backends as backends_module
from snapcore.lab.backends import first_backend, start_backend, threads_of


class Missing:
    def __init__(self, installed):
        self.installed = installed

    def __call__(self, name):
        if name not in self.installed:
            raise BackendNotFoundError(name)
        return f"the backend {name}"


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        ({"torch", "jax", "keras", "mine"}, "torch"),
        ({"jax", "keras", "mine"}, "jax"),
        ({"tensorflow", "keras"}, "tensorflow"),
        ({"mine", "zebra"}, "mine"),
    ],
)
def test_the_first_backend_is_the_preferred_one_of_those_installed(installed, chosen, monkeypatch):
    registered = dict.fromkeys(["zebra", "mine", "keras", "jax", "torch", "tensorflow"])
    monkeypatch.setattr(backends_module, "available_backends", lambda: registered)
    monkeypatch.setattr(backends_module, "load_backend", Missing(installed))
    assert first_backend() == (chosen, f"the backend {chosen}")


def test_without_any_framework_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(backends_module, "load_backend", Missing(set()))
    with pytest.raises(BackendNotFoundError, match=r"pip install 'snapcore\[torch\]'"):
        first_backend()


NOTES = (
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
    b"I0000 00:00:1796001398.620018   20712 port.cc:153] oneDNN custom operations are on.\n"
    b"W0000 00:00:1796001398.625090   20712 cudart_stub.cc:31] Could not find cuda drivers on your machine\n"
)


def noisy(text, result=None):
    """A `load_backend` that writes to the file descriptor, as C++ does."""

    def load(name):
        os.write(2, text)
        if isinstance(result, Exception):
            raise result
        return result

    return load


def test_notes_on_a_frameworks_start_are_held_back_and_all_else_passes(monkeypatch, capfd):
    text = NOTES + b"E0000 00:00:1796001398.620018 a.cc:1] out of order\n" + NOTES + b"your GPU is on fire\n"
    monkeypatch.setattr(backends_module, "load_backend", noisy(text, "a backend"))
    assert start_backend("mine") == "a backend"
    assert capfd.readouterr().err.splitlines() == [
        "E0000 00:00:1796001398.620018 a.cc:1] out of order",
        "your GPU is on fire",
    ]


def test_what_is_written_after_a_start_that_failed_is_seen(monkeypatch, capfd):
    monkeypatch.setattr(backends_module, "load_backend", noisy(NOTES, BackendNotFoundError("none")))
    with pytest.raises(BackendNotFoundError):
        start_backend("mine")
    os.write(2, b"I0000 00:00:1 a.cc:1] later\n")
    assert capfd.readouterr().err == "I0000 00:00:1 a.cc:1] later\n"


class Saying:
    def __init__(self, number):
        self.threads = lambda: number


@pytest.mark.parametrize(("backend", "threads"), [(Saying(3), 3), (Saying(None), 2), (object(), 2)])
def test_a_backend_that_does_not_say_its_threads_has_those_of_the_process(backend, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5}, raising=False)
    monkeypatch.setattr(backends_module, "load_backend", lambda name: backend)
    monkeypatch.setattr(backends_module, "_STARTED", {})
    assert threads_of("mine") == 2  # it has computed nothing, and is not started for this
    start_backend("mine")
    assert threads_of("mine") == threads
