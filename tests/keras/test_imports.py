"""What importing the adapter loads, and what it says when Keras or its framework is not installed."""

import json
import os
import subprocess
import sys

import pytest

FRAMEWORKS = ("tensorflow", "jax", "torch")
HIDE = """
import sys

class Without:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
"""


def printed(code, backend, *words):
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_it_loads_no_framework_that_keras_itself_does_not_load(backend):
    """Keras on PyTorch loads JAX too, where that is installed."""
    code = f"""
import json, sys, keras
found = lambda: [name for name in {FRAMEWORKS} if name in sys.modules]
own = found()
import snapcore_keras, snapcore_keras.backend
from snapcore import CosineCycles
keras.optimizers.SGD(snapcore_keras.SnapshotSchedule(CosineCycles(0.1, 64, 4)))
print(json.dumps([own, found()]))
"""
    own, found = json.loads(printed(code, backend))
    assert backend in own
    assert found == own


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("keras", "snapcore_keras needs Keras: pip install 'snapcore[keras]'"),
        ("jax", "Keras is to run on jax, which is not installed: pip install 'snapcore[jax]', or name one that is in"),
    ],
)
def test_what_is_missing_is_named_with_what_to_install(missing, message):
    code = HIDE + "\ntry:\n    import snapcore_keras\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    assert printed(code, "jax", missing).startswith(message)
