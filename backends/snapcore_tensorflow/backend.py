"""The backend verbs for TensorFlow: how a managed run drives the native loop, on one device or on several."""

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tensorflow as tf
from numpy.typing import NDArray

from snapcore import DataError, Program
from snapcore.backend import Data, Pending, Report
from snapcore.store import Tensors
from snapcore_keras.backend import KerasBackend, KerasState, Precision, built
from snapcore_keras.optimizers import Optimizer, Velocity, make_optimizer
from snapcore_keras.schedule import has_plain_rate, innermost
from snapcore_tensorflow.models import Factory
from snapcore_tensorflow.training import Loop

log = logging.getLogger(__name__)


@dataclass
class TensorFlowState(KerasState):
    """What a managed run continues from."""

    strategy: Any
    loop: Loop


class TensorFlowBackend(KerasBackend):
    """Train natively in TensorFlow, with a model of Keras: whole chunks of updates in one compiled call.

    TensorFlow takes all memory of every GPU unless memory growth is turned on before it is first used; making a backend
    turns it on. Where TensorFlow has been used before, and making a strategy is such a use, its memory stays as the
    program has set it.
    """

    name = "tensorflow"

    def __init__(self) -> None:
        _let_memory_grow()

    def about(self) -> str:
        """Return TensorFlow's version and the device it would use."""
        return f"tensorflow {tf.__version__} on {_device()}"

    def threads(self) -> int | None:
        """Return how many CPU threads an operation is spread over, if that was set; else TensorFlow takes all."""
        return tf.config.threading.get_intra_op_parallelism_threads() or None

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
        velocity: Velocity = "gradients",
        precision: Precision = "float32",
        optimizer: Optimizer | str = "sgd",
        xla: bool = False,
        strategy: Any = None,
    ) -> TensorFlowState:
        """Return the state before the first update.

        Arguments:
            model: `"mlp"`, `"cnn"`, `"fcn"`, or a function of (input_shape, n_outputs) that gives a built Keras model.
            data: examples, targets, their order and the loss; put on the device.
            program: gives the rates.
            seed: of the weights, together with `member`.
            member: whose fresh weights to make, from 1.
            momentum: of SGD, in Nesterov's form.
            weight_decay: of SGD, within the gradient; of AdamW, decoupled from it.
            velocity: which of two rules momentum follows, see `snapcore_keras.optimizers.Sgd`; by default that of
                PyTorch, optax and the paper.
            precision: what to compute in; weights stay float32.
            optimizer: `"sgd"`, `"adamw"`, or a function that makes another optimizer at a learning rate, a number,
                such as `keras.optimizers.Lion`.
            xla: whether XLA compiles the updates; XLA's own convolutions are slow on a CPU.
            strategy: the devices to train on together, a `tf.distribute.MirroredStrategy` or
                `MultiWorkerMirroredStrategy`: each has all of the weights, and an equal part of every batch. Batch
                statistics are those of each part, unless a layer synchronizes them, and a member has the first
                device's. By default one device.

        Raises:
            DataError: no such model, precision or optimizer, a batch that cannot be split equally, XLA on several
                devices, an optimizer with a schedule of its own, or that accumulates gradients, or a model whose
                outputs do not fit the data's targets.
        """
        _check_sharing(strategy, data, xla)
        strategy = strategy or tf.distribute.get_strategy()
        with strategy.scope():
            module = built(model, data, seed, member, precision)
            rate = float(program.schedule(0))
            chosen = make_optimizer(optimizer, rate, momentum=momentum, weight_decay=weight_decay, velocity=velocity)
            if not has_plain_rate(chosen):
                raise DataError(
                    "the optimizer must be made with the rate it is given, a number; it has a schedule of its own"
                )
            if innermost(chosen).gradient_accumulation_steps:
                raise DataError(
                    "the optimizer must do an update with every batch: make it without gradient_accumulation_steps"
                )
            chosen.build(module.trainable_variables)
        loop = Loop(module, chosen, data, program.schedule, strategy=strategy, xla=xla)
        return TensorFlowState(module, chosen, data, seed, strategy=strategy, loop=loop)

    def train(  # type: ignore[override]  # of the states that it makes
        self, state: TensorFlowState, start: int, stop: int, *, report: Report
    ) -> TensorFlowState:
        """Do updates `start … stop − 1`, whatever the optimizer has counted."""
        innermost(state.optimizer).iterations.assign(start)
        state.loop.run(start, stop, report)
        return state

    def restore(  # type: ignore[override]
        self, state: TensorFlowState, tensors: Tensors | None, *, optimizer: Literal["keep", "reset"]
    ) -> TensorFlowState:
        """Continue from `tensors`, the optimizer's moments kept or reset."""
        with state.strategy.scope():
            super().restore(state, tensors, optimizer=optimizer)
        return state

    def load(  # type: ignore[override]
        self, state: TensorFlowState, tensors: Pending | Tensors, values: dict[str, Any]
    ) -> TensorFlowState:
        """Resume from what `dump` returned."""
        with state.strategy.scope():
            super().load(state, tensors, values)
        return state

    def refresh(self, state: TensorFlowState, x: NDArray[Any]) -> TensorFlowState:  # type: ignore[override]
        """Return the state with batch statistics re-estimated on inputs `x`; random states are left alone."""
        with state.strategy.scope():
            super().refresh(state, x)
        return state


def _check_sharing(strategy: Any, data: Data, xla: bool) -> None:
    if strategy is None:
        return
    batch, ways = data.indices(0, 1).shape[1], strategy.num_replicas_in_sync
    if batch % ways:
        raise DataError(
            f"a batch of {batch} cannot be split over {ways} devices: choose a batch size that {ways} divides, such as "
            f"{math.ceil(batch / ways) * ways}"
        )
    if xla:
        raise DataError("XLA compiles for one device here: pass xla=True or strategy=, not both")


def _let_memory_grow() -> None:
    for gpu in tf.config.list_physical_devices("GPU"):
        if tf.config.get_logical_device_configuration(gpu) is not None:
            continue  # its memory is limited already
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            log.warning(
                "TensorFlow was in use before, and its memory on %s stays as it was set: all of it, unless "
                "tf.config.experimental.set_memory_growth was called",
                gpu.name,
            )


def _device() -> str:
    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else "cpu"


if TYPE_CHECKING:
    from snapcore.backend import Backend

    _checked: Backend[TensorFlowState] = TensorFlowBackend()
