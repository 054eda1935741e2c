"""The built-in models: what they compute, written again in NumPy, and how batch statistics move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snapcore import DataError
from snapcore_jax.models import MODELS, Cnn, Fcn, Mlp
from snapcore_jax.state import named_leaves


def made(model, shape, n_classes, seed):
    return nnx.jit(lambda: model(shape, n_classes, nnx.Rngs(seed)))()


@nnx.jit
def applied(model, x):
    return model(x)


def parameters(model):
    return sum(array.size for array in named_leaves(nnx.state(model, nnx.Param)).values())


def host(model):
    return {name: np.array(array, np.float64) for name, array in named_leaves(model).items()}


def relu(x):
    return np.maximum(x, 0)


def convolved(images, kernel):
    """Images [n, channels, height, width], a kernel [3, 3, channels, units] as Flax keeps it."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ijcu->nuhw", windows, kernel)


def pooled(images):
    n, units, height, width = images.shape
    even = images[:, :, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(n, units, height // 2, 2, width // 2, 2).max((3, 5))


def test_the_perceptron_is_two_hidden_layers_over_the_flattened_example():
    model = made(Mlp, (1, 28, 28), 7, seed=0)
    assert parameters(model) == (784 * 128 + 128) + (128 * 128 + 128) + (128 * 7 + 7)
    x = np.random.default_rng(0).normal(size=(4, 1, 28, 28)).astype(np.float32)
    w = host(model)
    hidden = relu(x.reshape(4, -1) @ w["hidden/0/kernel"] + w["hidden/0/bias"])
    hidden = relu(hidden @ w["hidden/1/kernel"] + w["hidden/1/bias"])
    np.testing.assert_allclose(applied(model, x), hidden @ w["output/kernel"] + w["output/bias"], atol=1e-4)


def test_the_convolutional_network_is_three_normalised_blocks_and_a_hidden_layer():
    model = made(Cnn, (3, 9, 16), 5, seed=1)
    convolutions = sum(9 * before * after + 2 * after for before, after in ((3, 32), (32, 64), (64, 128)))
    assert parameters(model) == convolutions + (128 * 1 * 2 * 128 + 128) + (128 * 5 + 5)
    random = np.random.default_rng(0)
    for block in model.blocks:
        block.norm.mean[...] = random.normal(size=block.norm.mean.shape) / 10
        block.norm.var[...] = random.uniform(0.5, 2, size=block.norm.var.shape)
    model.eval()
    x, w = random.normal(size=(2, 3, 9, 16)).astype(np.float32), host(model)
    images = x
    for index in range(3):
        norm = {name: w[f"blocks/{index}/norm/{name}"][:, None, None] for name in ("mean", "var", "scale", "bias")}
        images = convolved(images, w[f"blocks/{index}/convolution/kernel"])
        images = (images - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
        images = pooled(relu(images))
    flat = images.transpose(0, 2, 3, 1).reshape(2, -1)
    hidden = relu(flat @ w["hidden/kernel"] + w["hidden/bias"])
    np.testing.assert_allclose(applied(model, x), hidden @ w["output/kernel"] + w["output/bias"], atol=1e-4)


def test_running_statistics_move_by_a_tenth_towards_the_batchs():
    model = made(Cnn, (1, 8, 8), 3, seed=0)
    x = np.random.default_rng(0).normal(size=(6, 1, 8, 8)).astype(np.float32)
    images = convolved(x, host(model)["blocks/0/convolution/kernel"])
    model.train()
    applied(model, x)
    norm = model.blocks[0].norm
    np.testing.assert_allclose(norm.mean[...], 0.1 * images.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * images.var((0, 2, 3)), atol=1e-5)


def test_the_fully_convolutional_network_is_five_normalised_convolutions_and_a_linear_layer_on_each_pixel():
    model = made(Fcn, (2, 5, 7), 4, seed=1)
    assert parameters(model) == 9 * 2 * 32 + 4 * 9 * 32 * 32 + 5 * 2 * 32 + 32 * 4 + 4
    x = np.random.default_rng(0).normal(size=(3, 2, 5, 7)).astype(np.float32)
    w, images = host(model), x
    for block in range(5):
        images = convolved(images, w[f"blocks/{block}/convolution/kernel"])
        mean, variance = (images.mean((0, 2, 3), keepdims=True), images.var((0, 2, 3), keepdims=True))
        images = relu((images - mean) / np.sqrt(variance + 1e-5))  # fresh scales are 1, and shifts 0
    expected = np.moveaxis(images, 1, -1) @ w["output/kernel"] + w["output/bias"]
    assert expected.shape == (3, 5, 7, 4)
    np.testing.assert_allclose(applied(model, x), expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(64,), (8, 8)])
def test_the_fully_convolutional_network_refuses_what_is_no_image(shape):
    with pytest.raises(DataError, match=r"fcn needs examples of \(channels, height, width\), got"):
        Fcn(shape, 3, nnx.Rngs(0))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 17)])
def test_a_built_in_model_takes_images_of_any_shape_and_gives_a_logit_per_class(name, shape):
    def logits(x):
        return MODELS[name](shape, 6, nnx.Rngs(0))(x)

    assert jax.eval_shape(logits, jnp.zeros((4, *shape))).shape == (4, 6)


def test_in_bfloat16_everything_but_the_statistics_is_bfloat16():
    def after_a_batch(x):
        graph, params, others = nnx.split(Cnn((1, 8, 8), 3, nnx.Rngs(0)), nnx.Param, ...)
        model = nnx.merge(graph, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), others)
        return model(x), nnx.state(model, nnx.BatchStat)

    logits, statistics = jax.eval_shape(after_a_batch, jnp.zeros((2, 1, 8, 8), jnp.bfloat16))
    assert logits.dtype == jnp.bfloat16
    assert {array.dtype for array in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("shape", [(64,), (1, 7, 8), (8, 8)])
def test_what_is_no_image_or_a_small_one_is_refused(shape):
    with pytest.raises(DataError, match=r"cnn needs examples of \(channels, height, width\), each side 8 or more"):
        Cnn(shape, 3, nnx.Rngs(0))
