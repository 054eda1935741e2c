"""Several members, one compiled function: the mean of their probabilities."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import tensorflow as tf
from numpy.typing import NDArray

from snapcore import DataError
from snapcore.ensemble import Directory
from snapcore_keras.activations import Activation
from snapcore_keras.ensemble import SnapshotEnsemble as _KerasEnsemble
from snapcore_keras.strategies import Forward, Loop, Strategy, Weights


class _Graph:
    """The loop over the members as one graph.

    Arguments:
        forward: runs one member.
        members: the weights of each.
        xla: whether XLA compiles it.
    """

    def __init__(self, forward: Forward, members: Sequence[Weights], *, xla: bool) -> None:
        loop = Loop(forward, members)
        self._name, self._xla = forward.model.name, xla
        self._mean = tf.function(loop.mean, jit_compile=xla)
        self._each = tf.function(loop.each, jit_compile=xla)

    def mean(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the members' mean probabilities."""
        return self._call(self._mean, args, kwargs)

    def each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return each member's probabilities, the member axis first."""
        return self._call(self._each, args, kwargs)

    def _call(self, graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._xla:
            return graph(args, kwargs)
        try:
            return graph(args, kwargs)
        except tf.errors.OpError as error:
            raise DataError(f"{self._name} cannot be run by XLA: {error.message}; use strategy='loop'") from error


class SnapshotEnsemble(_KerasEnsemble):
    """Average the members' probabilities: h(x) = 1/m · Σ softmax of each of the last m members.

    As `snapcore_keras.SnapshotEnsemble`, of members that TensorFlow's own loop has written, and compiled by
    `tf.function`: once for every shape of batch.

    Arguments:
        members: each member's weights, arrays in the order of `model.weights`, as `model.get_weights()` gives them.
        model: built, of any kind: functional, sequential or a subclass.
        activation: from outputs to probabilities: `"softmax"` over the last axis, `"sigmoid"`, `"identity"` or a
            callable; or `"auto"`, which asks the compiled loss and the last layer, as `snapcore_keras` does.
        output: picks the tensor when the model returns something else, such as `lambda outputs: outputs[0]`.
        strategy: `"loop"`, one member after the other in one graph; or `"xla"`, the same compiled by XLA.

    Raises:
        StoreError: there are no members.
        DataError: a member does not fit the model, or an argument is unknown.

    Example:
        >>> import keras, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> members = [[np.zeros((4, 3)), np.zeros(3)], [np.ones((4, 3)), np.zeros(3)]]
        >>> tuple(SnapshotEnsemble(members, model)(np.ones((5, 4))).shape)
        (5, 3)

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, section 3.
    """

    _framework: ClassVar[str] = "tensorflow"
    _strategies: ClassVar[Mapping[str, Callable[[Forward, Sequence[Weights]], Strategy]]] = {
        "loop": partial(_Graph, xla=False),
        "xla": partial(_Graph, xla=True),
    }

    def __init__(
        self,
        members: Iterable[Sequence[NDArray[Any]]],
        model: Any,
        *,
        activation: str | Activation = "softmax",
        output: Callable[[Any], Any] | None = None,
        strategy: str = "loop",
    ) -> None:
        super().__init__(members, model, activation=activation, output=output, strategy=strategy)

    @classmethod
    def load(
        cls,
        directories: Directory | Iterable[Directory],
        model: Any,
        *,
        like: None = None,
        last: int | None = None,
        activation: str | Activation = "softmax",
        output: Callable[[Any], Any] | None = None,
        strategy: str = "loop",
    ) -> Self:
        """Load the members of one run, or of several.

        Arguments:
            directories: a run directory, or several; every file is checked against its digest.
            model: the architecture, built, with any weights. It is not changed, and may be trained on.
            like: left out; it is for adapters that take a function instead of a model.
            last: how many members of each run, counted from its end; default all. Unfinished ones are left out.
            activation: from outputs to probabilities, see `SnapshotEnsemble`.
            output: picks the tensor when the model returns something else.
            strategy: how the members are run, see `SnapshotEnsemble`.

        Raises:
            StoreError: a directory holds no run, or fewer than `last` members.
            CorruptSnapshotError: a file is not what was written.
            DataError: a member's positions and shapes are not the model's, it was written by another framework, or an
                argument is unknown.
        """
        return super().load(
            directories, model, like=like, last=last, activation=activation, output=output, strategy=strategy
        )
