"""The suite on JAX: the CNN for its batch statistics, and a network with dropout for its random keys."""

import os
from pathlib import Path

import pytest.__main__
from flax import nnx

from snapcore.testing import BackendConformance
from snapcore_jax.backend import JaxBackend

from ..forked import Forked

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


def test_every_rule_holds_on_a_mesh_of_eight_devices(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    given = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "SNAPCORE_REQUIRE": ""}
    process = Forked(pytest.__main__.__file__, "-q", "-p", "no:cacheprovider", MESH, log=tmp_path / "log", **given)
    assert process.wait() == 0, process.output + process.errors
    assert "21 passed" in process.output
