"""What six members cost in JAX, one after the other and stacked, beside one member."""

from collections.abc import Callable
from typing import Any

import jax
from cases import Setting, Suite, lasting
from compare import Contender
from flax import nnx
from jax_common import Cnn, about, made, noise

from snapcore_jax import SnapshotEnsemble

suite = Suite(about())
MEMBERS = 6


def predicting(predict: Callable[[jax.Array], jax.Array], x: jax.Array) -> Contender:
    return lasting(lambda: predict(x).block_until_ready())


def compare(setting: Setting, batch: int) -> None:
    side = setting.pick(full=32, small=8, tiny=8)
    width = setting.pick(full=64, small=8, tiny=4)
    batch = setting.pick(full=batch, small=batch, tiny=min(batch, 8))

    def model() -> nnx.Module:
        module = Cnn((3, side, side), 10, nnx.Rngs(0), width=width)
        module.eval()
        return module

    graph, _ = made(model)
    weights = [made(model, seed)[1] for seed in range(MEMBERS)]
    x = noise(batch, 3, side, side)
    setting.found |= {
        "members": MEMBERS,
        "batch": batch,
        "side": side,
        "parameters of one": sum(array.size for array in jax.tree.leaves(weights[0])),
    }

    def apply(weights: Any, x: jax.Array) -> jax.Array:
        outputs: jax.Array = nnx.merge(graph, weights)(x)
        return outputs

    one = jax.jit(lambda weights, x: jax.nn.softmax(apply(weights, x)))
    setting.compare(
        {
            strategy: predicting(SnapshotEnsemble(weights, apply, strategy=strategy), x)
            for strategy in ("loop", "stacked", "map")
        },
        {"one member": predicting(lambda x: one(weights[0], x), x)},
    )


@suite.comparison("six members, one example")
def batch_1(setting: Setting) -> None:
    compare(setting, 1)


@suite.comparison("six members, a batch of 32")
def batch_32(setting: Setting) -> None:
    compare(setting, 32)


@suite.comparison("six members, a batch of 1024")
def batch_1024(setting: Setting) -> None:
    compare(setting, 1024)
