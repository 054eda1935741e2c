"""The suite on JAX with data in parallel; run by `test_jax.py` in a process that has eight devices."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from snapcore import DataError
from snapcore.testing import BackendConformance
from snapcore_jax.backend import JaxBackend
from snapcore_jax.training import compiled


def with_statistics(input_shape, n_classes, rngs):
    pixels = input_shape[0] * input_shape[1] * input_shape[2]
    hidden, output = nnx.Linear(pixels, 16, rngs=rngs), nnx.Linear(16, n_classes, rngs=rngs)
    return nnx.Sequential(_flattened, hidden, nnx.BatchNorm(16, momentum=0.9, rngs=rngs), nnx.relu, output)


def with_dropout(input_shape, n_classes, rngs):
    layers = with_statistics(input_shape, n_classes, rngs).layers
    return nnx.Sequential(*layers[:-1], nnx.Dropout(0.2, rngs=rngs), layers[-1])


class TestJaxBackendOnAMesh(BackendConformance):
    model = staticmethod(with_statistics)
    random_model = staticmethod(with_dropout)
    options = {"mesh": jax.make_mesh((8,), ("data",))}  # noqa: RUF012

    def backend(self):
        return JaxBackend()


def test_weights_lie_whole_on_every_device():
    state = TestJaxBackendOnAMesh()._trained(2)
    for array in jax.tree.leaves(state.training):
        assert len(array.sharding.device_set) == 8
        assert array.is_fully_replicated


def test_eight_devices_share_a_batch_and_train_as_one_does():
    suite = TestJaxBackendOnAMesh()
    shared = suite._weights(suite._trained(6))
    suite.options = {}
    alone = suite._weights(suite._trained(6))
    for name, array in alone.items():
        np.testing.assert_allclose(shared[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_each_device_computes_its_part_of_the_batch_and_gradients_are_added_up():
    state = TestJaxBackendOnAMesh()._init()
    loop, rows = state.loop, state.loop.data.indices(0, 1)
    leaves, structure = jax.tree.flatten(state.training)
    keys, keys_structure = jax.tree.flatten(loop.keys)
    updates = compiled(loop.step, structure, keys_structure)
    first, number, rate = np.int32(0), np.int32(1), np.zeros(1, np.float32)
    lowered = updates.lower(leaves, keys, state.key, loop.x, loop.y, first, number, rate, rows)
    text = lowered.compile().as_text()
    assert rows.shape == (1, 16)
    assert "f32[2,16]" in text  # two of sixteen examples, the hidden layer's units
    assert "f32[16,16]" not in text
    assert "all-reduce" in text


def test_a_batch_that_eight_devices_cannot_share_is_refused():
    suite = TestJaxBackendOnAMesh()
    suite.data = lambda: dataclasses.replace(TestJaxBackendOnAMesh().data(), batch_size=12)
    with pytest.raises(DataError, match=r"a batch of 12 cannot be split over 8 devices: .* such as 16"):
        suite._init()


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_may_have_axes_of_any_type_and_more_than_one(axes):
    suite = TestJaxBackendOnAMesh()
    expected = suite._weights(suite._trained(3))
    suite.options = {"mesh": jax.make_mesh((4, 2), ("batch", "other"), axis_types=(axes, axes))}
    for name, array in suite._weights(suite._trained(3)).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def _flattened(x):
    return x.reshape(len(x), -1)
