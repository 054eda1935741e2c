"""The backend verbs for Keras: how a managed run drives the native loop, on whichever backend Keras runs."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from snapcore import DataError, Program
from snapcore.backend import Data, Pending, Report, check_outputs, resolved
from snapcore.run import random_state, set_random_state
from snapcore.store import Tensors
from snapcore_keras.losses import make_loss
from snapcore_keras.models import MODELS, Factory
from snapcore_keras.optimizers import Optimizer, Velocity, make_optimizer
from snapcore_keras.schedule import SnapshotSchedule
from snapcore_keras.state import Copy, dump_training, load_training, load_weights, named_weights, reset_moments
from snapcore_keras.training import run

Precision = Literal["float32", "bfloat16"]

_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}
_EVALUATION_BATCH = 1024


@dataclass
class KerasState:
    """What a managed run continues from."""

    model: Any
    optimizer: Any
    data: Data
    seed: int


class KerasBackend:
    """Train natively in Keras 3, on the backend that it is configured for."""

    name = "keras"

    def about(self) -> str:
        """Return Keras' version, and what it runs on."""
        return f"keras {keras.__version__} on {keras.backend.backend()}"

    def init(
        self,
        model: str | Factory,
        data: Data,
        program: Program,
        *,
        seed: int,
        member: int = 1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        velocity: Velocity = "updates",
        precision: Precision = "float32",
        optimizer: Optimizer | str = "sgd",
    ) -> KerasState:
        """Return the state before the first update.

        Arguments:
            model: `"mlp"`, `"cnn"`, `"fcn"`, or a function of (input_shape, n_outputs) that gives a built model.
            data: examples, targets, their order and the loss.
            program: gives the rates.
            seed: of the weights, together with `member`.
            member: whose fresh weights to make, from 1.
            momentum: of SGD, in Nesterov's form.
            weight_decay: of SGD, within the gradient; of AdamW, decoupled from it.
            velocity: which of two rules momentum follows, see `Sgd`.
            precision: what to compute in; weights stay float32.
            optimizer: `"sgd"`, `"adamw"`, or a function that makes another optimizer at a learning rate, which is a
                schedule, such as `keras.optimizers.Lion`.

        Raises:
            DataError: no such model, precision or optimizer, or a model whose outputs do not fit the data's targets.
        """
        module = built(model, data, seed, member, precision)
        rate = SnapshotSchedule(program.schedule)
        chosen = make_optimizer(optimizer, rate, momentum=momentum, weight_decay=weight_decay, velocity=velocity)
        compiles = False if keras.backend.backend() == "torch" else "auto"
        module.compile(chosen, make_loss(data.loss, data.ignore), jit_compile=compiles)
        chosen.build(module.trainable_variables)
        return KerasState(module, chosen, data, seed)

    def train(self, state: KerasState, start: int, stop: int, *, report: Report) -> KerasState:
        """Do updates `start … stop − 1`, whatever the optimizer has counted."""
        state.optimizer.iterations.assign(start)
        run(state.model, state.data, start, stop, report, seed=state.seed)
        return state

    def capture(self, state: KerasState) -> Copy:
        """Return a copy of parameters and batch statistics."""
        return Copy(named_weights(state.model))

    def restore(self, state: KerasState, tensors: Tensors | None, *, optimizer: Literal["keep", "reset"]) -> KerasState:
        """Continue from `tensors`, the optimizer's moments kept or reset."""
        if tensors is not None:
            load_weights(state.model, tensors, "the member")
        if optimizer == "reset":
            reset_moments(state.optimizer)
        return state

    def dump(self, state: KerasState) -> tuple[Copy, dict[str, Any]]:
        """Return a copy of weights, optimizer and the states of random layers."""
        return dump_training(state.model, state.optimizer), {"seed": state.seed}

    def load(self, state: KerasState, tensors: Pending | Tensors, values: dict[str, Any]) -> KerasState:
        """Resume from what `dump` returned."""
        load_training(state.model, state.optimizer, resolved(tensors))
        state.seed = values["seed"]
        return state

    def logits(self, state: KerasState, x: NDArray[Any]) -> NDArray[np.float32]:
        """Return the outputs in evaluation mode; the state is left alone."""
        starts = range(0, max(len(x), 1), _EVALUATION_BATCH)
        parts = [state.model(x[start : start + _EVALUATION_BATCH], training=False) for start in starts]
        return np.concatenate([np.asarray(ops.convert_to_numpy(part), np.float32) for part in parts])

    def refresh(self, state: KerasState, x: NDArray[Any]) -> KerasState:
        """Return the state with batch statistics re-estimated on inputs `x`; random states are left alone."""
        layers = [each for each in state.model._flatten_layers() if isinstance(each, keras.layers.BatchNormalization)]
        if not layers:
            return state
        statistics = [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]
        others = [each for each in state.model.non_trainable_variables if all(each is not own for own in statistics)]
        kept = [np.array(ops.convert_to_numpy(variable)) for variable in others]
        momenta = [layer.momentum for layer in layers]
        means: list[Any] = [0.0] * len(statistics)
        for layer in layers:
            layer.momentum = 0.0  # what a batch leaves is then its own
        for count, part in enumerate(np.array_split(x, max(1, -(-len(x) // _EVALUATION_BATCH))), 1):
            state.model(part, training=True)
            found = [np.asarray(ops.convert_to_numpy(variable), np.float64) for variable in statistics]
            means = [mean + (new - mean) / count for mean, new in zip(means, found, strict=True)]
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for variable, value in zip([*statistics, *others], [*means, *kept], strict=True):
            variable.assign(np.asarray(value, keras.backend.standardize_dtype(variable.dtype)))
        return state


def built(model: str | Factory, data: Data, seed: int, member: int, precision: str) -> Any:
    """Return a model with fresh weights, those of (seed, member).

    Raises:
        DataError: no such model or precision, or one that is not built, or whose outputs do not fit the data's targets.
    """
    factory = MODELS.get(model) if isinstance(model, str) else model
    if factory is None:
        raise DataError(
            f"model must be one of {sorted(MODELS)} or a function of (input_shape, n_outputs), got {model!r}"
        )
    if precision not in _POLICIES:
        raise DataError(f"precision must be one of {sorted(_POLICIES)}, got {precision!r}")
    with _seeded(seed, member), _computing(_POLICIES[precision]):
        made = factory(tuple(data.x.shape[1:]), data.n_outputs)
    named_weights(made)
    check_outputs(data, lambda x: _output_shape(made, x))
    return made


def _output_shape(model: Any, x: NDArray[Any]) -> tuple[int, ...]:
    outputs = model(x, training=False)
    if not ops.is_tensor(outputs):
        raise DataError(f"the model must return one tensor, got {type(outputs).__name__}: return its outputs alone")
    return tuple(outputs.shape)


@contextmanager
def _seeded(*parts: int) -> Iterator[None]:
    """Seed what Keras draws the seeds of initial weights and random layers from; the caller's states are restored."""
    callers = random_state()
    words = np.random.SeedSequence(parts).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    try:
        yield
    finally:
        set_random_state(callers)


@contextmanager
def _computing(policy: str) -> Iterator[None]:
    callers = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(callers)


if TYPE_CHECKING:
    from snapcore.backend import Backend

    _checked: Backend[KerasState] = KerasBackend()
