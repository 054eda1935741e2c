"""What the tests of Keras share: the script that fits on a backend, as a module and as processes."""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapcore import SnapcoreError

collect_ignore = [
    "ensemble_on_a_backend.py",
    "ensemble_of_a_loop.py",
    "recipe_on_a_backend.py",
]  # scripts, which the search for doctests would import
SCRIPT = Path(__file__).with_name("fit_on_a_backend.py")
BACKENDS = ("tensorflow", "jax", "torch")


def process(arguments, backend, **options):
    """Begin a process of Python on one of Keras' backends."""
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(autouse=True)
def _nothing_is_left_open():
    """Close what a `fit` that died in a test has left: an open run would be asked to answer a later test's signals."""
    yield
    callback = sys.modules.get("snapcore_keras.callback")
    for left in [] if callback is None else [*callback._OPEN.values()]:
        with contextlib.suppress(SnapcoreError):
            left.close()


@pytest.fixture(scope="session")
def formula():
    """Equation 2, by hand; by default for α₀ = 0.02 and three cycles in 24 updates."""

    def rate(step, steps=24, cycles=3):
        length = math.ceil(steps / cycles)
        return 0.02 / 2 * (math.cos(math.pi * (step % length) / length) + 1)

    return rate


@pytest.fixture(scope="session")
def fits():
    """The script as a module, on the backend of this process."""
    spec = importlib.util.spec_from_file_location("fit_on_a_backend", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    """What the script saw on every backend."""
    folders = {backend: tmp_path_factory.mktemp(backend) for backend in BACKENDS}
    begun = {backend: process([SCRIPT, folder], backend) for backend, folder in folders.items()}
    for backend, each in begun.items():
        error = each.communicate()[1]
        assert each.returncode == 0, f"{backend}: {error}"
    return {backend: json.loads((folder / "seen.json").read_text()) for backend, folder in folders.items()}
