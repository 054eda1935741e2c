"""Several members, one compiled function: the mean of their probabilities."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import tensorflow as tf

from snapcore import DataError
from snapcore.ensemble import Directory, Output, Recipe, reason
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
        self._log_mean = tf.function(partial(loop.mean, log=True), jit_compile=xla)
        self._each = tf.function(loop.each, jit_compile=xla)

    def mean(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, log: bool = False) -> Any:
        """Return the members' mean probabilities, or their logarithms."""
        return self._call(self._log_mean if log else self._mean, args, kwargs)

    def each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return each member's probabilities, the member axis first."""
        return self._call(self._each, args, kwargs)

    def _call(self, graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._xla:
            return graph(args, kwargs)
        try:
            return graph(args, kwargs)
        except tf.errors.OpError as error:
            raise DataError(f"{self._name} cannot be run by XLA: {reason(error)}; use strategy='loop'") from error


class SnapshotEnsemble(_KerasEnsemble):
    """Average the members' probabilities: h(x) = 1/m · Σ softmax of each of the last m members.

    As `snapcore_keras.SnapshotEnsemble`, of members that TensorFlow's own loop has written, and compiled by
    `tf.function`: once for every shape of batch.

    Arguments:
        members: each member's weights, arrays in the order of `model.weights`, as `model.get_weights()` gives them.
        model: built, of any kind: functional, sequential or a subclass.
        activation: from outputs to probabilities: `"softmax"`, `"sigmoid"`, `"identity"` or a callable. Or
            `"gaussian"`, for outputs [..., 2 · values], means and then ln variances: a call gives the mixture's mean
            and variance, [..., values, 2], or [..., 2] of one value. Or `"auto"`, which asks the compiled loss and the
            last layer, as `snapcore_keras` does.
        axis: of the classes, for softmax; by default the last.
        output: picks the tensor when the model returns something else: a key or attribute such as `"logits"`, a
            position such as `0`, or a function.
        strategy: `"loop"`, one member after the other in one graph; or `"xla"`, the same compiled by XLA.
        allow_equal: whether members whose weights differ may give equal outputs for the first batch.
        recipe: the members' weights, as many as there are members, and the temperature. `"identity"` takes a
            temperature for one of classes.

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

    _frameworks: ClassVar[Sequence[str]] = ("tensorflow",)
    _strategies: ClassVar[Mapping[str, Callable[[Forward, Sequence[Weights]], Strategy]]] = {
        "loop": partial(_Graph, xla=False),
        "xla": partial(_Graph, xla=True),
    }

    def __init__(
        self,
        members: Iterable[Sequence[Any]],
        model: Any,
        *,
        activation: str | Activation = "softmax",
        axis: int | None = None,
        output: Output | None = None,
        strategy: str = "loop",
        allow_equal: bool = False,
        recipe: Recipe | Directory | None = None,
    ) -> None:
        super().__init__(
            members,
            model,
            activation=activation,
            axis=axis,
            output=output,
            strategy=strategy,
            allow_equal=allow_equal,
            recipe=recipe,
        )

    @classmethod
    def load(
        cls,
        directories: Directory | Iterable[Directory],
        model: Any,
        *,
        like: None = None,
        last: int | None = None,
        members: Iterable[int] | None = None,
        activation: str | Activation = "softmax",
        axis: int | None = None,
        output: Output | None = None,
        strategy: str = "loop",
        mapped: bool = False,
        allow_equal: bool = False,
        recipe: Recipe | Directory | None = None,
    ) -> Self:
        """Load the members of one run, or of several.

        Arguments:
            directories: a run directory, or several; every file is checked against its digest.
            model: the architecture, built, with any weights. It is not changed, and may be trained on.
            like: left out; it is for adapters that take a function instead of a model.
            last: how many members of each run, counted from its end; default all. Unfinished ones are left out.
            members: instead, the indices of each run's members to take, such as `[1, 3]`.
            activation: from outputs to probabilities, see `SnapshotEnsemble`, as `axis`.
            axis: of the classes.
            output: picks the tensor when the model returns something else.
            strategy: how the members are run, see `SnapshotEnsemble`.
            mapped: left out; it is for PyTorch. Keras copies weights to its devices.
            allow_equal: whether members whose weights differ may give equal outputs for the first batch.
            recipe: or the path of its file: says which members are used, with which weights, at which temperature, and
                when a cascade stops. `last` and `members` are left out then; members without a weight are not loaded.

        Raises:
            StoreError: a directory holds no run, or not the members asked for; or there is no such recipe.
            CorruptSnapshotError: a file is not what was written.
            DataError: a member's positions and shapes are not the model's, it was written by another framework, the
                recipe is for other members, or an argument is unknown.
        """
        return super().load(
            directories,
            model,
            like=like,
            last=last,
            members=members,
            activation=activation,
            axis=axis,
            output=output,
            strategy=strategy,
            mapped=mapped,
            allow_equal=allow_equal,
            recipe=recipe,
        )

    @staticmethod
    def _compile(run: Callable[..., Any]) -> Any:
        return tf.function(run)
