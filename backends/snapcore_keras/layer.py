"""The ensemble as one Keras layer, which holds all members' weights and is saved and exported with a model."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from snapcore import DataError
from snapcore.ensemble import Output, Recipe
from snapcore_keras.activations import Activation
from snapcore_keras.state import named_weights
from snapcore_keras.strategies import Forward, Loop


@keras.saving.register_keras_serializable(package="snapcore")
class MeanOfMembers(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Average the members' probabilities: h(x) = 1/m · Σ activation(model with the weights of member i (x)).

    In evaluation mode, whatever it is called with; nothing in it is trained.

    Arguments:
        model: built; neither changed nor tracked, but saved as a configuration.
        members: arrays of each in the order of `model.weights`, which are copied, or variables, which are shared; or
            how many there are, all zero until weights are loaded.
        activation: `"softmax"`, `"sigmoid"`, `"identity"` or a callable.
        axis: of the classes, for softmax.
        output: picks the tensor when the model returns something else.
        recipe: the members' weights and the temperature of their mean.
    """

    def __init__(
        self,
        model: Any,
        members: int | Iterable[Sequence[Any]],
        *,
        activation: str | Activation = "softmax",
        axis: int | None = None,
        output: Output | None = None,
        recipe: Recipe | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**{"trainable": False, "autocast": False, "dtype": "float32", **options})
        named_weights(model)
        self.run_one = Forward(model, activation, axis, output, recipe)
        # No weights, but what a model needs besides them: tracked here, they are saved and exported with it.
        self.vocabularies = [layer for layer in model._flatten_layers() if hasattr(layer, "save_assets")]
        arrays = [[None] * len(self.run_one.variables)] * members if isinstance(members, int) else members
        self.members = tuple(self._held(number, each) for number, each in enumerate(arrays))
        self.built = True

    def call(self, inputs: Any, log: bool = False) -> Any:
        """Return the members' mean probabilities, or their logarithms."""
        return Loop(self.run_one, self.members).mean((inputs,), {}, log=log)

    def get_config(self) -> dict[str, Any]:
        """Return what the layer is made again of, without the weights.

        Raises:
            DataError: a vocabulary has weights by tf-idf, which Keras needs before it loads them.
        """
        for layer in self.vocabularies:
            if "tf_idf" in (getattr(layer, "output_mode", None), getattr(layer, "_output_mode", None)):
                raise DataError(
                    f"{layer.name!r} weighs words by tf-idf, which an ensemble cannot save: load it from its run"
                )
        model = keras.saving.serialize_keras_object(self.run_one.model)
        model.pop("compile_config", None)  # a loss and an optimizer, which members have no use for
        activation, output = map(keras.saving.serialize_keras_object, (self.run_one.activation, self.run_one.output))
        own = {"model": model, "members": len(self.members), "activation": activation, "output": output}
        own["axis"], recipe = self.run_one.axis, self.run_one.pooling.recipe
        own["recipe"] = recipe and {"weights": list(recipe.weights), "temperature": recipe.temperature}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Make the layer from its configuration."""
        parts = {
            name: keras.saving.deserialize_keras_object(config[name]) for name in ("model", "activation", "output")
        }
        recipe = config.get("recipe")
        return cls(**{**config, **parts, "recipe": recipe and Recipe(**recipe)})

    def _held(self, member: int, arrays: Sequence[Any]) -> tuple[Any, ...]:
        pairs = enumerate(zip(self.run_one.variables, arrays, strict=True))
        return tuple(self._weight(f"member_{member}_{position:03d}", like, array) for position, (like, array) in pairs)

    def _weight(self, name: str, like: Any, array: Any) -> Any:
        if isinstance(array, keras.Variable):
            return array

        def initial(shape: tuple[int, ...], dtype: str) -> Any:
            # A copy: the array may be mapped to its file, and not writable.
            return ops.zeros(shape, dtype) if array is None else ops.convert_to_tensor(np.array(array), dtype)

        kind = keras.backend.standardize_dtype(like.dtype)
        return self.add_weight(tuple(like.shape), initial, dtype=kind, trainable=False, autocast=False, name=name)
