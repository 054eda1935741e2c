"""The backend verbs for JAX: how a managed run drives the native loop. A state is a value; each verb gives the next."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from numpy.typing import NDArray

from snapcore import DataError, Program
from snapcore.backend import Data, Pending, Report, check_outputs, resolved, targets
from snapcore.store import Tensors
from snapcore_jax.losses import make_loss
from snapcore_jax.models import MODELS, Factory
from snapcore_jax.state import Copy, dump_training, load_training, named_leaves, with_leaves
from snapcore_jax.training import Loop
from snapcore_jax.updates import AdamW, Optimizer, Sgd, Step, Training, split, whole

Precision = Literal["float32", "bfloat16"]
_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
_EVALUATION_BATCH = 1024


@dataclass(frozen=True, eq=False)
class JaxState:
    """What a managed run trains: each verb takes one and gives the next."""

    training: Training
    key: jax.Array
    """What dropout and the like draw from, together with the update's number."""
    loop: Loop
    evaluation: Any
    """The module without its arrays, in evaluation mode."""
    refreshing: Any
    """The same in training mode, where a batch leaves its own statistics behind, and nothing of earlier ones."""

    @property
    def weights(self) -> Any:
        """Parameters and batch statistics, as one state of Flax NNX."""
        return nnx.merge_state(self.training.params, self.training.others)

    def with_weights(self, weights: Any) -> "JaxState":
        """Return the state with other weights."""
        parts = split(weights)
        return replace(self, training=self.training._replace(params=parts.params, others=parts.others))

    def with_optimizer(self, optimizer: Any) -> "JaxState":
        """Return the state with other moments and counts."""
        return replace(self, training=self.training._replace(optimizer=optimizer))


class JaxBackend:
    """Train natively in JAX, on its default device, or on a mesh of them."""

    name = "jax"

    def about(self) -> str:
        """Return JAX's version and the device it would use."""
        device = jax.devices()[0]
        return f"jax {jax.__version__} on {device.device_kind}"

    def init(
        self,
        model: str | Factory,
        data: Data,
        program: Program,
        *,
        seed: int,
        member: int = 1,
        mesh: Mesh | None = None,
        precision: Precision = "float32",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        optimizer: Optimizer | str = "sgd",
    ) -> JaxState:
        """Return the state before the first update.

        Arguments:
            model: `"mlp"`, `"cnn"`, `"fcn"`, or a function of (input_shape, n_outputs, rngs) that gives a Flax NNX
                module.
            data: examples, targets, their order and the loss; put on the device.
            program: gives the rates.
            seed: of the weights, together with `member`.
            member: whose fresh weights to make, from 1.
            mesh: the devices to train on together, such as `jax.make_mesh((8,), ("data",))`: each has all of the
                weights, and an equal part of every batch, split over the mesh's first axis. Batch statistics are
                those of the whole batch. By default JAX's default device.
            precision: what to compute in; weights stay float32.
            momentum: of SGD, in Nesterov's form.
            weight_decay: of the optimizer; AdamW's is decoupled from the gradient.
            optimizer: `"sgd"`, `"adamw"`, or a function that makes another optimizer for a schedule, such as
                `optax.lion`.

        Raises:
            DataError: no such model, precision or optimizer, a batch that cannot be split equally, or a model whose
                outputs do not fit the data's targets.
        """
        factory = _factory(model)
        shape, n_outputs = tuple(data.x.shape[1:]), data.n_outputs
        training_graph, evaluation_graph, refreshing_graph = _graphs(factory, shape, n_outputs)
        check_outputs(data, functools.partial(_output_shape, factory, n_outputs))
        mesh = None if mesh is None else _automatic(mesh, data)
        chosen = _optimizer(optimizer, momentum, weight_decay)
        step = Step(training_graph, chosen, _dtype(precision), mesh, make_loss(data.loss, data.ignore))
        parts = split(_on_devices(mesh, _fresh(factory, shape, n_outputs, _key(seed, member))))
        due = targets(data)
        due = due.astype(np.int32, copy=False) if np.issubdtype(due.dtype, np.integer) else due
        x, y = _on_devices(mesh, (np.asarray(data.x), due))
        training = Training(parts.params, parts.others, _moments(step, parts.params))
        key = _on_devices(mesh, _key(seed, 0))
        loop = Loop(step, data, x, y, parts.keys, program.schedule).fitted(training, key)
        return JaxState(training, key, loop, evaluation_graph, refreshing_graph)

    def train(self, state: JaxState, start: int, stop: int, *, report: Report) -> JaxState:
        """Do updates `start … stop − 1`; the arrays of the state given are given away."""
        training = state.loop.run(state.training, state.key, start, stop, report)
        return replace(state, training=training)

    def capture(self, state: JaxState) -> Copy:
        """Return a copy of parameters and batch statistics."""
        return Copy(named_leaves(state.weights))

    def restore(
        self,
        state: JaxState,
        tensors: Mapping[str, NDArray[Any]] | None,
        *,
        optimizer: Literal["keep", "reset"],
    ) -> JaxState:
        """Return the state with the weights of `tensors`, the optimizer's moments kept or reset."""
        if tensors is not None:
            state = state.with_weights(with_leaves(state.weights, tensors))
        if optimizer == "reset":
            state = state.with_optimizer(_moments(state.loop.step, state.training.params))
        return state

    def dump(self, state: JaxState) -> tuple[Copy, dict[str, Any]]:
        """Return a copy of weights, optimizer and the key of all random draws."""
        return dump_training(state.weights, _rest(state)), {}

    def load(self, state: JaxState, tensors: Pending | Tensors, values: dict[str, Any]) -> JaxState:  # noqa: ARG002
        """Resume from what `dump` returned."""
        weights, rest = load_training(state.weights, _rest(state), resolved(tensors))
        return replace(state.with_weights(weights).with_optimizer(rest["optimizer"]), key=rest["key"])

    def logits(self, state: JaxState, x: NDArray[Any]) -> NDArray[np.float32]:
        """Return the outputs in evaluation mode; the state is left alone."""
        # One device will do; each of a mesh has all of the weights.
        arrays = jax.tree.map(
            lambda array: array.addressable_data(0), (state.training.params, state.loop.keys, state.training.others)
        )
        starts = range(0, max(len(x), 1), _EVALUATION_BATCH)
        batches = [np.asarray(x[start : start + _EVALUATION_BATCH]) for start in starts]
        return np.concatenate([np.asarray(_evaluated(state.evaluation, arrays, batch)) for batch in batches])

    def refresh(self, state: JaxState, x: NDArray[Any]) -> JaxState:
        """Return the state with batch statistics re-estimated on inputs `x`."""
        arrays = (state.training.params, state.loop.keys, state.training.others)
        mean: Any = None
        for count, part in enumerate(np.array_split(x, max(1, -(-len(x) // _EVALUATION_BATCH))), 1):
            found = _statistics(state.refreshing, arrays, part)
            mean = found if mean is None else jax.tree.map(functools.partial(_towards, count), mean, found)
        return replace(state, training=state.training._replace(others=mean))


def _factory(model: str | Factory) -> Factory:
    factory = MODELS.get(model) if isinstance(model, str) else model
    if factory is None:
        raise DataError(
            f"model must be one of {sorted(MODELS)} or a function of (input_shape, n_outputs, rngs), got {model!r}"
        )
    return factory


def _output_shape(factory: Factory, n_outputs: int, x: NDArray[Any]) -> tuple[int, ...]:
    """Return the shape of what a module returns for inputs; nothing is computed."""

    def outputs(x: jax.Array) -> Any:
        model = _made(factory, x.shape[1:], n_outputs, nnx.Rngs(0))
        model.eval()
        return model(x)

    found = jax.eval_shape(outputs, x)
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise DataError(f"the model must return one array, got {type(found).__name__}: return its outputs alone")
    return tuple(found.shape)


def _dtype(precision: str) -> Any:
    if precision not in _DTYPES:
        raise DataError(f"precision must be one of {sorted(_DTYPES)}, got {precision!r}")
    return _DTYPES[precision]


def _graphs(factory: Factory, input_shape: tuple[int, ...], n_outputs: int) -> tuple[Any, Any, Any]:
    model = nnx.eval_shape(lambda: _made(factory, input_shape, n_outputs, nnx.Rngs(0)))
    model.train()
    training = nnx.graphdef(model)
    model.eval()
    evaluation = nnx.graphdef(model)
    model.train()
    model.set_attributes(nnx.BatchNorm, momentum=0.0, raise_if_not_found=False)
    return training, evaluation, nnx.graphdef(model)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fresh(factory: Factory, input_shape: tuple[int, ...], n_outputs: int, key: jax.Array) -> Any:
    return nnx.state(_made(factory, input_shape, n_outputs, nnx.Rngs(key)))


def _made(factory: Factory, input_shape: tuple[int, ...], n_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    model = factory(input_shape, n_outputs, rngs)
    if not isinstance(model, nnx.Module):
        raise DataError(f"the model's function must give a flax.nnx.Module, got {type(model).__name__}")
    return model


def _moments(step: Step, params: Any) -> Any:
    return _on_devices(step.mesh, step.optimizer(lambda _: 0.0).init(params))


@functools.partial(jax.jit, static_argnums=0)
def _evaluated(graph: Any, arrays: tuple[Any, Any, Any], x: Any) -> Any:
    return nnx.merge(graph, *arrays, copy=True)(x).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _statistics(graph: Any, arrays: tuple[Any, Any, Any], x: Any) -> Any:
    model = nnx.merge(graph, *arrays, copy=True)
    model(x)
    return split(nnx.state(model)).others


def _towards(count: int, mean: Any, new: Any) -> Any:
    return mean + (new - mean) / count if jnp.issubdtype(mean.dtype, jnp.floating) else new


def _optimizer(chosen: Optimizer | str, momentum: float, weight_decay: float) -> Optimizer:
    named: dict[str, Optimizer] = {"sgd": Sgd(momentum, weight_decay), "adamw": AdamW(weight_decay)}
    if not isinstance(chosen, str):
        return chosen
    if chosen not in named:
        raise DataError(f"optimizer must be 'sgd', 'adamw' or a function of the schedule, got {chosen!r}")
    return named[chosen]


def _key(*parts: int) -> jax.Array:
    words = jnp.array(np.random.SeedSequence(parts).generate_state(2))
    key: jax.Array = jax.random.wrap_key_data(words, impl="threefry2x32")
    return key


def _rest(state: JaxState) -> dict[str, Any]:
    return {"optimizer": state.training.optimizer, "key": state.key}


def _on_devices(mesh: Mesh | None, tree: Any) -> Any:
    return jax.device_put(tree) if mesh is None else jax.device_put(tree, whole(mesh))


def _automatic(mesh: Mesh, data: Data) -> Mesh:
    """Check a mesh, and have the compiler spread the work over it, as a mesh's axes may ask not to."""
    batch, ways = data.indices(0, 1).shape[1], mesh.devices.shape[0]
    if batch % ways:
        raise DataError(
            f"a batch of {batch} cannot be split over {ways} devices: choose a batch size that {ways} divides, such as "
            f"{math.ceil(batch / ways) * ways}"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


if TYPE_CHECKING:
    from snapcore.backend import Backend

    _checked: Backend[JaxState] = JaxBackend()
