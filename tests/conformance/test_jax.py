"""The suite on JAX: the CNN for its batch statistics, and a network with dropout for its random keys."""

import os
import subprocess
import sys
from pathlib import Path

from flax import nnx

from snapcore.testing import BackendConformance
from snapcore_jax.backend import JaxBackend

MESH = Path(__file__).with_name("jax_on_a_mesh.py")


def with_dropout(input_shape, n_classes, rngs):
    pixels = input_shape[0] * input_shape[1] * input_shape[2]
    hidden, output = nnx.Linear(pixels, 16, rngs=rngs), nnx.Linear(16, n_classes, rngs=rngs)
    return nnx.Sequential(flattened, hidden, nnx.Dropout(0.2, rngs=rngs), nnx.relu, output)


def flattened(x):
    return x.reshape(len(x), -1)


class TestJaxBackend(BackendConformance):
    model = "cnn"
    random_model = staticmethod(with_dropout)

    def backend(self):
        return JaxBackend()


def test_every_rule_holds_on_a_mesh_of_eight_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "SNAPCORE_REQUIRE": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(MESH)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "21 passed" in done.stdout
