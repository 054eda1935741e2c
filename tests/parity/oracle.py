"""The oracle: both networks, their gradients, both momentum rules and the paper's rate, in NumPy and float64.

Nothing here comes from a framework or from snapcore. A layer maps its input to its output and a function that takes the
gradient back through it; images have their channels last. Weights are a dict: `dense1/kernel` [in, out], `dense1/bias`,
`conv1/kernel` [height, width, in, out], and of batch normalisation `norm1/scale`, `shift`, `mean`, `variance`.
"""

import itertools
import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

STATISTICS = ("/mean", "/variance")
NORM_MOMENTUM, NORM_EPSILON = 0.9, 1e-5


def rate(t, lr, steps, cycles):
    """Return equation 2 of the paper: the rate of iteration t = 1 … T."""
    length = math.ceil(steps / cycles)
    return lr / 2 * (math.cos(math.pi * ((t - 1) % length) / length) + 1)


def ends(steps, cycles):
    """Return the updates done at the end of every cycle, the last one cut short by T."""
    length = math.ceil(steps / cycles)
    return tuple(min(k * length, steps) for k in range(1, math.ceil(steps / length) + 1))


def gradients_rule(weights, velocity, gradient, lr, momentum):
    """PyTorch and optax: the velocity is of gradients, v ← m·v + g, w ← w − α·(g + m·v)."""
    velocity = momentum * velocity + gradient
    return weights - lr * (gradient + momentum * velocity), velocity


def updates_rule(weights, velocity, gradient, lr, momentum):
    """Keras: the velocity is of updates, each at the rate of its own time, v ← m·v − α·g, w ← w + m·v − α·g."""
    velocity = momentum * velocity - lr * gradient
    return weights + momentum * velocity - lr * gradient, velocity


RULES = {"gradients": gradients_rule, "updates": updates_rule}


def dense(name):
    def forward(weights, x, _):
        kernel = weights[f"{name}/kernel"]

        def backward(d):
            return d @ kernel.T, {f"{name}/kernel": x.T @ d, f"{name}/bias": d.sum(0)}

        return x @ kernel + weights[f"{name}/bias"], backward

    return forward


def convolution(name):
    """3 × 3 with a border of zeros, and no bias."""

    def forward(weights, x, _):
        kernel, windows = weights[f"{name}/kernel"], _windows(x)

        def backward(d):
            upon_kernel = np.tensordot(windows, d, ([0, 1, 2], [0, 1, 2])).transpose(1, 2, 0, 3)
            return np.tensordot(_windows(d), kernel[::-1, ::-1], ([4, 5, 3], [0, 1, 3])), {
                f"{name}/kernel": upon_kernel
            }

        return np.tensordot(windows, kernel, ([4, 5, 3], [0, 1, 2])), backward

    return forward


def _windows(x):
    return sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2))


def normalisation(name, ddof):
    """Batch normalisation; `ddof` 1 makes the running variance that of n − 1 values, the batch's own is always of n."""

    def forward(weights, x, statistics):
        axes, n = (0, 1, 2), x[..., 0].size
        old, scale = (weights[f"{name}/mean"], weights[f"{name}/variance"]), weights[f"{name}/scale"]
        mean, variance = old if statistics is None else (x.mean(axes), x.var(axes))
        deviation = np.sqrt(variance + NORM_EPSILON)
        normal = (x - mean) / deviation
        if statistics is not None:
            for what, before, now in zip(STATISTICS, old, (mean, variance * n / (n - ddof)), strict=True):
                statistics[name + what] = NORM_MOMENTUM * before + (1 - NORM_MOMENTUM) * now

        def backward(d):
            upon_scale, upon_shift = (d * normal).sum(axes), d.sum(axes)
            upon_x = scale / deviation * (d - upon_shift / n - normal * upon_scale / n)
            return upon_x, {f"{name}/scale": upon_scale, f"{name}/shift": upon_shift}

        return normal * scale + weights[f"{name}/shift"], backward

    return forward


def relu(_weights, x, _):
    return np.maximum(x, 0), lambda d: (d * (x > 0), {})


def pool(_weights, x, _):
    """The largest of 2 × 2; of several, the first."""
    n, height, width, channels = x.shape
    parted = (n, height // 2, 2, width // 2, 2, channels)
    blocks = x.reshape(parted).transpose(0, 1, 3, 5, 2, 4).reshape(n, height // 2, width // 2, channels, 4)
    chosen = np.eye(4, dtype=bool)[blocks.argmax(-1)]

    def backward(d):
        spread = (d[..., None] * chosen).reshape(*blocks.shape[:4], 2, 2)
        return spread.transpose(0, 1, 4, 2, 5, 3).reshape(x.shape), {}

    return blocks.max(-1), backward


def channels_last(_weights, x, _):
    return x.transpose(0, 2, 3, 1), lambda d: (d.transpose(0, 3, 1, 2), {})


def flat(_weights, x, _):
    return x.reshape(len(x), -1), lambda d: (d.reshape(x.shape), {})


def mlp(ddof=0):
    return [flat, dense("dense1"), relu, dense("dense2"), relu, dense("dense3")]


def cnn(ddof=0):
    blocks = ([convolution(f"conv{k}"), normalisation(f"norm{k}", ddof), relu, pool] for k in (1, 2, 3))
    return [channels_last, *itertools.chain(*blocks), flat, dense("dense1"), relu, dense("dense2")]


NETWORKS = {"mlp": mlp, "cnn": cnn}


def logits(network, weights, x):
    """Return the outputs in evaluation mode."""
    for layer in network:
        x, _ = layer(weights, x, None)
    return x


def loss_and_gradients(network, weights, x, y, weight_decay=0.0):
    """Return the mean cross-entropy, the gradients with L2's share in them, and the new running statistics.

    L2 is weight_decay/2 · ‖w‖² over all that is trained, biases and batch normalisation's scale and shift too.
    """
    way_back, statistics = [], {}
    for layer in network:
        x, backward = layer(weights, x, statistics)
        way_back.append(backward)
    p, rows = softmax(x), np.arange(len(y))
    loss = -np.log(p[rows, y]).mean()
    p[rows, y] -= 1
    d, gradients = p / len(y), {}
    for backward in reversed(way_back):
        d, found = backward(d)
        gradients |= found
    return loss, {name: g + weight_decay * weights[name] for name, g in gradients.items()}, statistics


def softmax(values):
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def rate_used(rule, before, after, velocity, gradient, momentum):
    """Return the rate that took the weights `before` to those `after`, by least squares over all of them.

    Both rules are linear in the rate: what they do at rate 1 less what they do at 0 is its coefficient.
    """
    still, full = (RULES[rule](before, velocity, gradient, lr, momentum)[0] for lr in (0.0, 1.0))
    return (after - still) @ (full - still) / ((full - still) @ (full - still))
