"""The ensemble as one Keras layer, which holds all members' weights and is saved and exported with a model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from snapcore_keras.activations import Activation
from snapcore_keras.state import named_weights
from snapcore_keras.strategies import Forward, Loop


@keras.saving.register_keras_serializable(package="snapcore")
class MeanOfMembers(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Average the members' probabilities: h(x) = 1/m · Σ activation(model with the weights of member i (x)).

    In evaluation mode, whatever it is called with; nothing in it is trained.

    Arguments:
        model: built; neither changed nor tracked, but saved as a configuration.
        members: arrays of each in the order of `model.weights`; or how many there are, all zero until weights are
            loaded.
        activation: `"softmax"`, `"sigmoid"`, `"identity"` or a callable.
        output: picks the tensor when the model returns something else.
    """

    def __init__(
        self,
        model: Any,
        members: int | Iterable[Sequence[NDArray[Any]]],
        *,
        activation: str | Activation = "softmax",
        output: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**{"trainable": False, "autocast": False, "dtype": "float32", **options})
        named_weights(model)
        self.run_one = Forward(model, activation, output)
        arrays = [[None] * len(self.run_one.variables)] * members if isinstance(members, int) else members
        self.members = tuple(self._held(number, each) for number, each in enumerate(arrays))
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Return the members' mean probabilities."""
        return Loop(self.run_one, self.members).mean((inputs,), {})

    def get_config(self) -> dict[str, Any]:
        """Return what the layer is made again of, without the weights."""
        model = keras.saving.serialize_keras_object(self.run_one.model)
        model.pop("compile_config", None)  # a loss and an optimizer, which members have no use for
        activation, output = map(keras.saving.serialize_keras_object, (self.run_one.activation, self.run_one.output))
        own = {"model": model, "members": len(self.members), "activation": activation, "output": output}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Make the layer from its configuration."""
        parts = {
            name: keras.saving.deserialize_keras_object(config[name]) for name in ("model", "activation", "output")
        }
        return cls(**{**config, **parts})

    def _held(self, member: int, arrays: Sequence[NDArray[Any] | None]) -> tuple[Any, ...]:
        pairs = enumerate(zip(self.run_one.variables, arrays, strict=True))
        return tuple(self._weight(f"member_{member}_{position:03d}", like, array) for position, (like, array) in pairs)

    def _weight(self, name: str, like: Any, array: NDArray[Any] | None) -> Any:
        def initial(shape: tuple[int, ...], dtype: str) -> Any:
            # A copy: the array may be mapped to its file, and not writable.
            return ops.zeros(shape, dtype) if array is None else ops.convert_to_tensor(np.array(array), dtype)

        kind = keras.backend.standardize_dtype(like.dtype)
        return self.add_weight(tuple(like.shape), initial, dtype=kind, trainable=False, autocast=False, name=name)
