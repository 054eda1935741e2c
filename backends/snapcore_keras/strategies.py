"""The ways to run all members on one batch: one after the other, or stacked into one vectorised call."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import keras
from keras import ops

from snapcore import DataError
from snapcore.ensemble import Output, Pooling, Recipe, pick, reason
from snapcore_keras.activations import Activation, classes_last

Weights = Sequence[Any]
"""One member's: variables or tensors, in the order of `model.weights`."""

_INSTEAD = "use strategy='loop'"
_HALF = ("float16", "bfloat16")  # averaged in float32
_VECTORISING = ("jax", "torch")
"""What Keras' `vectorized_map` can run a model on: TensorFlow's fails in the layers' own bookkeeping."""


class Strategy(Protocol):
    """All members on one batch."""

    def mean(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, log: bool = False) -> Any:
        """Return the members' mean probabilities."""

    def each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return each member's probabilities, the member axis first."""


class Forward:
    """Run a model with other weights than its own, in evaluation mode; the model's own stay as they are.

    Arguments:
        model: built.
        activation: from outputs to probabilities: a name or a callable.
        axis: of the classes, for softmax.
        output: picks the tensor when the model returns something else.
        recipe: how members are pooled.
    """

    def __init__(
        self,
        model: Any,
        activation: str | Activation,
        axis: int | None,
        output: Output | None,
        recipe: Recipe | None = None,
    ) -> None:
        self.model, self.activation, self.axis, self.output = model, activation, axis, output
        self.pooling = Pooling(ops, activation, axis, classes_last=classes_last(), recipe=recipe)
        self.variables = list(model.weights)
        layers = model._flatten_layers()
        self._derived = [layer for layer in layers if hasattr(layer, "finalize_state") and layer.weights]

    def __call__(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any], *, logs: bool = False) -> Any:
        """Return one member's probabilities, or their logarithms."""
        return self.activated(self.outputs(weights, args, kwargs), logs=logs)

    def activated(self, outputs: Any, *, logs: bool = False) -> Any:
        """Return the probabilities, or their logarithms, of one member's outputs."""
        half = keras.backend.standardize_dtype(outputs.dtype) in _HALF
        return self.pooling.activated(ops.cast(outputs, "float32") if half else outputs, logs=logs)

    def outputs(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return one member's outputs.

        Raises:
            DataError: the model returns several tensors and `output` is missing, or it has got other weights.
        """
        if list(map(id, self.model.weights)) != list(map(id, self.variables)):
            raise DataError(
                f"{self.model.name} has got other weights since the ensemble was made of it: load the ensemble again, "
                "with a model as it was trained"
            )
        # What `stateless_call` does, but through the model's `__call__`: it casts inputs and weights to the model's
        # precision, and passes `training` on only where `call` takes it.
        own = [dict(vars(layer)) for layer in self._derived]
        try:
            with keras.StatelessScope(state_mapping=list(zip(self.variables, weights, strict=True))):
                for layer in self._derived:
                    layer.finalize_state()  # as after loading: what it computes from its weights, from these
                found = self.model(*args, **{**kwargs, "training": False})
        finally:
            for layer, attributes in zip(self._derived, own, strict=True):
                vars(layer).update(attributes)
        return pick(found, self.output, ops.is_tensor)


class Loop:
    """One member after the other.

    Arguments:
        forward: runs one.
        members: the weights of each.
    """

    def __init__(self, forward: Forward, members: Sequence[Weights]) -> None:
        self._forward, self._members = forward, members

    def mean(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, log: bool = False) -> Any:
        """Return the members' mean probabilities, or their logarithms."""
        pooling = self._forward.pooling
        return pooling.pooled(self._each(args, kwargs, logs=pooling.in_logs(log)), log=log)

    def each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return each member's probabilities, the member axis first."""
        return ops.stack(list(self._each(args, kwargs, logs=False)))

    def _each(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, logs: bool) -> Iterator[Any]:
        return (self._forward(weights, args, kwargs, logs=logs) for weights in self._members)


class Stacked:
    """All members in one vectorised call; their weights are held a second time, stacked.

    Arguments:
        forward: runs one.
        members: the weights of each.

    Raises:
        DataError: Keras runs on a backend whose `vectorized_map` cannot run a model.
    """

    def __init__(self, forward: Forward, members: Sequence[Weights]) -> None:
        backend = keras.backend.backend()
        if backend not in _VECTORISING:
            raise DataError(
                f"strategy 'stacked' needs Keras to run on {' or '.join(_VECTORISING)}, got {backend}, whose "
                f"vectorized_map cannot run a model: {_INSTEAD}"
            )
        self._forward, self._first = forward, members[0]
        self._stacks = [
            ops.stack([ops.convert_to_tensor(each) for each in same]) for same in zip(*members, strict=True)
        ]

    def mean(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, log: bool = False) -> Any:
        """Return the members' mean probabilities, or their logarithms."""
        pooling = self._forward.pooling
        return pooling.pooled_stack(self._every(args, kwargs, logs=pooling.in_logs(log)), log=log)

    def each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return each member's probabilities, the member axis first."""
        return self._every(args, kwargs, logs=False)

    def _every(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, logs: bool) -> Any:
        """Return what each member gives.

        Raises:
            DataError: the model does something that cannot be vectorised; what fails one by one too, by its own error.
        """
        try:
            return ops.vectorized_map(lambda weights: self._forward(weights, args, kwargs, logs=logs), self._stacks)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # the last is what Keras makes of JAX's
            failed = error
        self._forward(self._first, args, kwargs)  # where one member fails too, it is not for being stacked
        raise DataError(f"{self._forward.model.name} cannot be run stacked: {reason(failed)}; {_INSTEAD}") from failed
