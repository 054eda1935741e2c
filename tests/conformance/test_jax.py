"""The suites on JAX. For the backend: the CNN for its batch statistics, and a network with dropout for its keys."""

import functools
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest.__main__
from flax import nnx

from snapcore.testing import BackendConformance, LoopConformance
from snapcore_jax import SnapshotEnsemble, SnapshotRun, snapshot_schedule
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


@pytest.mark.exhaustive
def test_every_rule_holds_on_a_mesh_of_eight_devices(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    given = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "SNAPCORE_REQUIRE": ""}
    process = Forked(pytest.__main__.__file__, "-q", "-p", "no:cacheprovider", MESH, log=tmp_path / "log", **given)
    assert process.wait() == 0, process.output + process.errors
    assert "23 passed" in process.output


def optimizer(schedule):
    return optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(snapshot_schedule(schedule)))


def outputs(variables, x):
    return (x - variables["batch_stats"]["mean"]) @ variables["params"]["kernel"]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update(schedule, variables, rest, x):
    """Descend towards outputs of 1, with a running mean and dropout."""
    state, key = rest
    key, now = jax.random.split(key)
    kept = x * jax.random.bernoulli(now, 0.7, x.shape)
    means = {"mean": 0.9 * variables["batch_stats"]["mean"] + 0.1 * x.mean(0)}
    params = variables["params"]
    grads = jax.grad(lambda params: jnp.square(outputs({"params": params, "batch_stats": means}, kept) - 1).mean())(
        params
    )
    changes, state = optimizer(schedule).update(grads, state, params)
    return {"params": optax.apply_updates(params, changes), "batch_stats": means}, (state, key)


class TestJaxRun(LoopConformance):
    framework = "jax"

    def new(self, seed, schedule):
        key, now = jax.random.split(jax.random.key(seed))
        params = {"kernel": jax.random.normal(now, (3, 2))}
        rest = (optimizer(schedule).init(params), key)
        return SimpleNamespace(
            schedule=schedule, variables={"params": params, "batch_stats": {"mean": jnp.zeros(3)}}, rest=rest
        )

    def init(self, seed, schedule):
        return self.new(seed, schedule).variables

    def open(self, directory, cycles, subject, **options):
        run = SnapshotRun(directory, cycles, optimizer=optimizer(subject.schedule), **options)
        subject.variables, subject.rest = run.start(subject.variables, subject.rest)
        return run

    def update(self, subject, x):
        subject.variables, subject.rest = update(subject.schedule, subject.variables, subject.rest, x)

    def step(self, run, subject):
        subject.variables, subject.rest = run.step(subject.variables, subject.rest)

    def weights(self, subject):
        return {f"{kind}/{name}": array for kind, part in subject.variables.items() for name, array in part.items()}

    def moments(self, subject):
        return jax.tree.leaves(subject.rest[0][0])

    def rate(self, subject):
        moved, _ = optax.scale_by_learning_rate(snapshot_schedule(subject.schedule)).update(
            jnp.ones(()), subject.rest[0][1]
        )
        return -moved

    def spoil(self, subject):
        subject.variables["params"]["kernel"] *= jnp.nan

    def ensemble(self, directory, x):
        ensemble = SnapshotEnsemble.load(directory, outputs, like=self.new(0, self.cycles).variables)
        return np.array(ensemble(x)), np.array(ensemble.members(x))
