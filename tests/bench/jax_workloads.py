"""What is run in the benchmarks of the JAX adapter: imported within them, since to import JAX is to begin threads."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from snapcore import CosineCycles, program
from snapcore.data import TrainingData
from snapcore_jax import SnapshotEnsemble
from snapcore_jax.backend import JaxBackend
from snapcore_jax.models import MODELS
from snapcore_jax.strategies import STRATEGIES

from .compare import SECONDS, Contender, fastest
from .workloads import STAGES, WIDTH

LR = 0.05
SHAPE, CLASSES = (1, 8, 8), 10
Weights = Any


def equations(function: Callable[..., Any]) -> int:
    """Return how many equations a function of a count is traced to, those of nested functions too."""
    return _equations(jax.make_jaxpr(function)(jnp.int32(0)).jaxpr)


def _equations(jaxpr: Any) -> int:
    inner = (value.jaxpr for each in jaxpr.eqns for value in each.params.values() if hasattr(value, "jaxpr"))
    return len(jaxpr.eqns) + sum(map(_equations, inner))


def sgdr(cycles: CosineCycles) -> optax.Schedule:
    """Return the cycles as optax has them."""
    length = cycles.steps // cycles.cycles
    one = {"init_value": cycles.lr, "peak_value": cycles.lr, "decay_steps": length, "warmup_steps": 0}
    return optax.sgdr_schedule([one] * cycles.cycles)


def updating(rate: optax.Schedule, step: int, number: int) -> Contender:
    """Give the update of 32 × 32 weights by `optax.sgd` at a rate: small, so that the rate is a part of its time."""
    optimizer = optax.sgd(rate)
    params = {"w": jnp.ones((32, 32))}
    state = jax.tree.map(lambda count: jnp.full_like(count, step), optimizer.init(params))

    @jax.jit
    def update(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(params, state)
        return optax.apply_updates(params, updates), state

    def run() -> None:
        for _ in range(number):
            found = update(params, state)
        jax.block_until_ready(found)

    return Contender(run, units=number)


def managed(data: TrainingData, updates: int) -> Contender:
    """Give updates by the adapter, each sample with a state of its own: arrays are given away."""
    backend, method, states = JaxBackend(), program("snapshot", lr=LR, steps=10**6, cycles=2), []

    def prepare() -> None:
        states[:] = [backend.init("mlp", data, method, seed=0)]
        jax.block_until_ready(states[0].training)

    def run() -> None:
        state = backend.train(states.pop(), 0, updates, report=lambda _, loss: math.isfinite(loss))
        jax.block_until_ready(state.training)

    return Contender(run, prepare, units=updates)


def by_hand(data: TrainingData, updates: int, *, loop: str) -> Contender:
    """Give the same updates as one would write them: `"scan"` compiles all as one, `"python"` calls one by one."""
    graph, params = nnx.split(MODELS["mlp"](SHAPE, CLASSES, nnx.Rngs(0)))
    x, y = jnp.array(data.x), jnp.array(data.y)
    cosine = optax.cosine_decay_schedule(LR, 500_000)
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(cosine, momentum=0.9, nesterov=True))

    def update(carry: Any, rows: Any) -> Any:
        def objective(params: Any) -> Any:
            logits = nnx.merge(graph, params)(x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        params, state = carry
        loss, gradients = jax.value_and_grad(objective)(params)
        changes, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, changes), state), loss

    @jax.jit(donate_argnums=0)
    def scan(carry: Any, rows: Any) -> Any:
        return lax.scan(update, carry, rows)

    one = jax.jit(update, donate_argnums=0)
    carries: list[Any] = []

    def prepare() -> None:
        carries[:] = [jax.block_until_ready(jax.tree.map(jnp.copy, (params, optimizer.init(params))))]

    def scanned() -> None:
        jax.block_until_ready(scan(carries.pop(), data.indices(0, updates)))

    def called() -> None:
        carry = carries.pop()
        for rows in data.indices(0, updates):
            carry, _ = one(carry, rows)
        jax.block_until_ready(carry)

    return Contender({"scan": scanned, "python": called}[loop], prepare, units=updates)


def hundred_megabytes() -> dict[str, jax.Array]:
    """Return 25 float32 arrays of 1000 × 1000: 100 MB."""
    keys = jax.random.split(jax.random.key(0), 25)
    return jax.block_until_ready({f"w{index}": jax.random.normal(key, (1000, 1000)) for index, key in enumerate(keys)})


def device_copies(tree: Any, kept: list[Any], *, wait: bool) -> Callable[[], None]:
    """Return what copies a tree on its device; copies are kept, as a snapshot is: to free them is no part of it."""

    def copy() -> None:
        kept.append(jax.tree.map(jnp.copy, tree))
        if wait:
            jax.block_until_ready(kept)

    return copy


class Residual(nnx.Module):
    """A small residual network: as `workloads.Residual`, with the channels last."""

    def __init__(self, input_shape: tuple[int, ...], n_classes: int, rngs: nnx.Rngs) -> None:
        def convolution(before: int, after: int, stride: int = 1) -> nnx.Module:
            return nnx.Conv(before, after, (3, 3), stride, use_bias=False, rngs=rngs)

        width = WIDTH
        self.stem, self.stem_norm = convolution(input_shape[0], width), nnx.BatchNorm(width, rngs=rngs)
        blocks = []
        for stage in range(STAGES):
            after, stride = WIDTH << stage, 2 if stage else 1
            blocks.append(
                [
                    *(convolution(width, after, stride), nnx.BatchNorm(after, rngs=rngs)),
                    *(convolution(after, after), nnx.BatchNorm(after, rngs=rngs)),
                    nnx.Conv(width, after, (1, 1), stride, use_bias=False, rngs=rngs),
                ]
            )
            width = after
        self.blocks = nnx.List([nnx.List(block) for block in blocks])
        self.output = nnx.Linear(width, n_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(jnp.moveaxis(x, 1, -1))))
        for first, first_norm, second, second_norm, shortcut in self.blocks:
            x = nnx.relu(second_norm(second(nnx.relu(first_norm(first(x))))) + shortcut(x))
        return self.output(x.mean((1, 2)))


def members(model: str, count: int) -> tuple[list[Weights], Callable[[Weights, Any], jax.Array]]:
    """Return the weights of several built-in models, and the function of weights and batch in evaluation mode."""
    make = {**MODELS, "residual": Residual}[model]
    models = [make(SHAPE, CLASSES, nnx.Rngs(seed)) for seed in range(count)]
    for each in models:
        each.eval()
    graph = nnx.graphdef(models[0])
    return [nnx.state(each) for each in models], lambda weights, x: nnx.merge(graph, weights)(x)


def predicting(predict: Callable[[Any], jax.Array], x: jax.Array, number: int) -> Contender:
    return Contender(lambda: predict(x).block_until_ready(), number=number)


def looped(weights: list[Weights], apply_fn: Callable[[Weights, Any], jax.Array]) -> Callable[[Any], jax.Array]:
    """Return the mean probabilities by a Python loop over members, each of them compiled."""
    member = jax.jit(lambda weights, x: jax.nn.softmax(apply_fn(weights, x)))
    return lambda x: jnp.stack([member(each, x) for each in weights]).mean(0)


def tuned_and_best(
    weights: list[Weights], apply_fn: Callable[[Weights, Any], jax.Array], x: jax.Array, number: int, pairs: int
) -> tuple[SnapshotEnsemble, str, SnapshotEnsemble]:
    """Return an ensemble after `tune`, and the strategy that is the best by a measurement of its own.

    What `tune` has found to be more than twice as slow as its fastest is not measured again.
    """
    ensemble = SnapshotEnsemble(weights, apply_fn)
    report = ensemble.tune(x)
    limit = 2 * report[report.chosen].seconds
    near = [name for name in STRATEGIES if (report[name].seconds or np.inf) <= limit]
    fixed = {name: SnapshotEnsemble(weights, apply_fn, strategy=name) for name in near}
    contenders = {name: predicting(each, x, number) for name, each in fixed.items()}
    best = fastest(contenders, pairs=pairs, seconds=SECONDS)
    return ensemble, best, fixed[best]
