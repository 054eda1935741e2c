"""Several members, one model: the mean of their probabilities."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from snapcore import DataError
from snapcore.ensemble import (
    ROUNDS,
    TOLERANCE,
    Directory,
    Output,
    Recipe,
    TuningReport,
    as_recipe,
    check_members,
    check_strategy,
    checked_recipe,
    predict,
    recipe_files,
    refuse_like,
    refuse_mapped,
    tune,
)
from snapcore.store import map_tensors
from snapcore_keras.activations import Activation, ends_in, resolved
from snapcore_keras.first_batch import OutputCheck, is_symbolic, on_host
from snapcore_keras.layer import MeanOfMembers
from snapcore_keras.members import fitted_weights
from snapcore_keras.state import fitted, named_weights
from snapcore_keras.strategies import Forward, Loop, Stacked, Strategy, Weights

_NO_VALUES = "a cascade looks at values, and in a graph or trace there are none: call it outside"


class SnapshotEnsemble:
    """Average the members' probabilities: h(x) = 1/m · Σ softmax of each of the last m members.

    In evaluation mode: no dropout, and batch normalisation by each member's own statistics. Members are loaded with
    `SnapshotEnsemble.load`. What runs them is the model itself, called in a `keras.StatelessScope` with each member's
    weights instead of its own: so it is not changed, and may be trained on; nor is what it would assign kept.

    Calling it gives mean probabilities, in the shape of the outputs, or with `log=True` their logarithms; `members(…)`
    gives each member's, with the member axis first; `predict(…)` gives the mean for any number of examples in NumPy,
    compiled by Keras; `cascade(…)` asks each member only for the examples that need it. It has a length, and yields
    each member as an ensemble of one. `functional()` is a model to save or export. `tune(…)` measures the strategies on
    a batch and keeps the fastest. It pickles, if the model does.

    With a recipe the mean is weighted, and what is pooled is brought to the recipe's temperature T: softmax(ln h / T)
    over the classes, or sigmoid(logit h / T) for each label.

    Arguments:
        members: each member's weights, arrays in the order of `model.weights`, as `model.get_weights()` gives them.
        model: built, of any kind: functional, sequential or a subclass.
        activation: from outputs to probabilities: `"softmax"`, `"sigmoid"`, `"identity"` or a callable. Or
            `"gaussian"`, for outputs [..., 2 · values], means and then ln variances: a call gives the mixture's mean
            and variance, [..., values, 2], or [..., 2] of one value. `"auto"` reads `from_logits` of the compiled loss,
            and is identity for Keras' losses of values, such as `mse`, and gaussian for
            `snapcore_keras.losses.GaussianNll`; a loss of your own leaves it to a last layer of softmax or sigmoid, or
            is refused; without a loss it is softmax, but for such a last layer. It is checked against the first
            member's outputs for the first batch, or for zeros where a model or graph is being built.
        axis: of the classes, for softmax; by default the last. Where `keras.config.image_data_format()` is
            `"channels_first"` it may be left out for outputs [batch, classes] alone.
        output: picks the tensor when the model returns something else: a key or attribute such as `"logits"`, a
            position such as `0`, or a function.
        strategy: `"loop"`, one member after the other; or `"stacked"`, all in one vectorised call, which needs the
            weights a second time, and Keras to run on JAX or PyTorch.
        allow_equal: whether members whose weights differ may give equal outputs for the first batch.
        recipe: the members' weights, as many as there are members, and the temperature. `"identity"`, also where
            `"auto"` finds it, takes a temperature for one of classes.

    Raises:
        StoreError: there are no members.
        DataError: a member does not fit the model, an argument is unknown, or the strategy is none for this backend.

    Example:
        >>> import keras, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> members = [[np.zeros((4, 3)), np.zeros(3)], [np.ones((4, 3)), np.zeros(3)]]
        >>> ensemble = SnapshotEnsemble(members, model)
        >>> tuple(ensemble(np.ones((5, 4))).shape), tuple(ensemble.members(np.ones((5, 4))).shape)
        ((5, 3), (2, 5, 3))

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, section 3.
    """

    _frameworks: ClassVar[Sequence[str]] = ("keras", "jax", "torch")
    _strategies: ClassVar[Mapping[str, Callable[[Forward, Sequence[Weights]], Strategy]]] = {
        "loop": Loop,
        "stacked": Stacked,
    }

    _strategy: str
    _run: Strategy
    _check: OutputCheck

    def __init__(
        self,
        members: Iterable[Sequence[Any]],
        model: Any,
        *,
        activation: str | Activation = "auto",
        axis: int | None = None,
        output: Output | None = None,
        strategy: str = "loop",
        allow_equal: bool = False,
        recipe: Recipe | Directory | None = None,
    ) -> None:
        check_strategy(strategy, self._strategies)
        _check_model(model)
        activation, self._check_outputs = resolved(activation, model, axis, output)
        used = None if recipe is None else as_recipe(recipe)
        if used is not None and used.temperature != 1 and activation == "identity" and ends_in(model) == "sigmoid":
            raise DataError(
                "the model ends in sigmoid, and under activation='identity' a temperature is one of classes: build the "
                "model without that last activation, and pass activation='sigmoid'"
            )
        given = _fitting(members, model)
        layer = MeanOfMembers(model, given, activation=activation, axis=axis, output=output, recipe=used)
        checked_recipe(used, len(layer.members))
        self._allow_equal = allow_equal
        self._hold(layer, strategy)

    @classmethod
    def load(
        cls,
        directories: Directory | Iterable[Directory],
        model: Any,
        *,
        like: None = None,
        last: int | None = None,
        members: Iterable[int] | None = None,
        activation: str | Activation = "auto",
        axis: int | None = None,
        output: Output | None = None,
        strategy: str = "loop",
        mapped: bool = False,
        allow_equal: bool = False,
        recipe: Recipe | Directory | None = None,
    ) -> Self:
        """Load the members of one run, or of several.

        Arguments:
            directories: a run directory, or several; every file is checked against its digest. Members may also come
                from a loop in JAX or PyTorch over a model of Keras, if it is plain which weight is which.
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
        check_strategy(strategy, cls._strategies)
        refuse_like(like)
        refuse_mapped(mapped)
        _check_model(model)
        files, used = recipe_files(directories, recipe, framework=cls._frameworks, last=last, members=members)
        return cls(
            [fitted_weights(model, map_tensors(file), str(file)) for file in files],
            model,
            activation=activation,
            axis=axis,
            output=output,
            strategy=strategy,
            allow_equal=allow_equal,
            recipe=used,
        )

    @property
    def strategy(self) -> str:
        """How the members are run."""
        return self._strategy

    @property
    def recipe(self) -> Recipe | None:
        """How members are weighted, for these members alone; None where they are equal."""
        return self._layer.run_one.pooling.recipe

    def __len__(self) -> int:
        """Return how many members there are."""
        return len(self._layer.members)

    def __iter__(self) -> Iterator[Self]:
        """Yield each member as an ensemble of one, which gives its probabilities and shares its weights."""
        one = self._layer.run_one
        for weights in self._layer.members:
            member = object.__new__(type(self))
            member._allow_equal, member._check_outputs = self._allow_equal, self._check_outputs
            layer = MeanOfMembers(one.model, [weights], activation=one.activation, axis=one.axis, output=one.output)
            member._hold(layer, "loop")
            yield member

    def __call__(self, *args: Any, log: bool = False, **kwargs: Any) -> Any:
        """Return the members' mean probabilities, weighted and tempered by the recipe; a tensor of Keras' backend.

        Arguments:
            *args: go to the model. Given a `keras.Input`, this is a layer of the model that is being built.
            log: return log-probabilities, exact where probabilities underflow.
            **kwargs: go to the model; `training` is always False.

        Raises:
            DataError: the first batch's outputs are not what the activation takes them for, or the strategy cannot run
                the model.
        """
        self._layer.run_one.pooling.check_log(log)
        self._check(args, kwargs)
        if is_symbolic((args, kwargs)):
            return self._layer(*args, **kwargs, **_said(log))
        return self._run.mean(args, kwargs, log=log)

    def members(self, *args: Any, **kwargs: Any) -> Any:
        """Return each member's own probabilities, shape [members, batch, …], without weights and temperature."""
        self._check(args, kwargs)
        return self._run.each(args, kwargs)

    def cascade(self, *args: Any, log: bool = False, return_used: bool = False, **kwargs: Any) -> Any:
        """Return mean probabilities by the recipe's cascade: each member runs on the examples that are left.

        Members are asked from the last to the first, and an example that is sure enough is asked no further; see
        `snapcore.ensemble.fit_cascade`. In float32. What is left is filled up to the batch or its half, quarter, eighth
        or sixteenth, so that a compiler sees five shapes at most. That members differ is not checked, since that would
        ask them all.

        Arguments:
            *args: go to the model. Of all arrays the first axis is the batch, also within lists and dicts.
            log: return log-probabilities.
            return_used: return also how many members each example used, a NumPy array of integers [batch].
            **kwargs: go to the model, as `args`; `training` is always False.

        Raises:
            DataError: the recipe has no cascade, outputs are not [batch, classes] under softmax, arrays are of several
                lengths, there are no values (in a graph or trace), or as for a call.
        """
        one, members = self._layer.run_one, self._layer.members
        arrays = [leaf for leaf in keras.tree.flatten((args, kwargs)) if hasattr(leaf, "shape")]

        def ask(index: int, rows: NDArray[np.int64]) -> NDArray[Any]:
            def take(leaf: Any) -> Any:
                if not getattr(leaf, "shape", ()):
                    return leaf
                return leaf[rows] if isinstance(leaf, np.ndarray) else ops.take(leaf, rows, axis=0)

            some, named = keras.tree.map_structure(take, (args, kwargs))
            outputs = self._outputs([ops.convert_to_tensor(weight) for weight in members[index]], some, named)
            values = on_host(outputs)
            if values is None:
                raise DataError(_NO_VALUES)
            self._check.first_outputs(values)
            return np.asarray(ops.convert_to_numpy(one.activated(outputs, logs=True)))

        if is_symbolic((args, kwargs)):
            raise DataError(_NO_VALUES)
        shapes = [tuple(array.shape) for array in arrays]
        found, used = one.pooling.cascade(ask, shapes, bucketed=True, log=log)
        result = ops.convert_to_tensor(found)
        return (result, used) if return_used else result

    def predict(self, x: Any, batch_size: int = 32, *, log: bool = False) -> NDArray[Any]:
        """Return what a call gives for any number of examples, by Keras' compiled `predict`.

        The strategy plays no part in it: it is the model that `functional` gives.

        Arguments:
            x: an array of examples, or a list or dict of arrays as the model takes them. Or batches: a
                `tf.data.Dataset`, a `keras.utils.PyDataset`, a `DataLoader`, or any iterable of inputs x, or of tuples
                or lists that begin with them, such as (x, y): what follows is not used.
            batch_size: how many examples of arrays to run at once, 1 or more.
            log: return log-probabilities.

        Raises:
            DataError: there are no examples, or as for a call.
        """
        run = partial(self._predict_batch, log=log)
        if isinstance(x, keras.utils.PyDataset):
            return predict(run, (x[position] for position in range(x.num_batches)))
        if not self._are_inputs(x):
            if not isinstance(x, Iterable):
                raise DataError(f"predict needs arrays or an iterable of batches, got {type(x).__name__}")
            return predict(run, x)
        model = self._compiled(x, keras.tree.map_structure(lambda array: array[:batch_size], x), log=log)
        return np.asarray(model.predict(x, batch_size=batch_size, verbose=0))

    def functional(self, x: Any = None, *, log: bool = False) -> Any:
        """Return a functional model whose outputs are what a call gives, to `save`, `export` or build on.

        It shares the members' weights with the ensemble, and runs them one after the other. To be saved as `.keras`,
        a model of a class of your own must be registered with Keras; to be exported it need not be. Keras exports a
        SavedModel on TensorFlow, and on JAX where TensorFlow is installed; on PyTorch `export(…, format="torch")`.

        Arguments:
            x: one batch, for a model that does not say what its inputs are, such as one of a class of your own.
            log: have it return log-probabilities.

        Raises:
            DataError: neither the model nor `x` says what the inputs are, or the outputs of `x`, without it of a batch
                of zeros, are not what the activation takes them for.
        """
        self._layer.run_one.pooling.check_log(log)
        inputs = _inputs(self._layer.run_one.model, x)
        self._check((inputs if x is None else x,), {})
        return keras.Model(inputs, self._layer(inputs, **_said(log)), name="snapshot_ensemble")

    def tune(self, *args: Any, tolerance: float = TOLERANCE, rounds: int = ROUNDS, **kwargs: Any) -> TuningReport:
        """Measure every strategy on a batch, keep the fastest that gives what the loop gives, and return the report.

        Arguments:
            *args: the batch, as for a call; measure what you will use, also its size.
            tolerance: the largest deviation from the loop, max |p − q| / max |q|, with which a strategy may be kept.
            rounds: the most samples of each, taken in turns: about 10 ms of calls, or one that lasts longer. After 5
                rounds slow strategies are passed over, and 2 s end it.
            **kwargs: as for a call.
        """
        self._check(args, kwargs)
        made = {self._strategy: self._run}

        def run(name: str) -> NDArray[Any]:
            if name not in made:
                made[name] = self._strategies[name](self._layer.run_one, self._layer.members)
            return np.asarray(ops.convert_to_numpy(made[name].mean(args, kwargs)))  # which waits for it

        report = tune(run, list(self._strategies), to_host=np.asarray, tolerance=tolerance, rounds=rounds)
        self._strategy, self._run = report.chosen, made[report.chosen]
        return report

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the model as Keras pickles it, and the members' weights."""
        one, members = self._layer.run_one, self._layer.members
        return {
            "members": [[np.asarray(ops.convert_to_numpy(weight)) for weight in weights] for weights in members],
            "model": one.model,
            "activation": one.activation,
            "axis": one.axis,
            "output": one.output,
            "strategy": self._strategy,
            "allow_equal": self._allow_equal,
            "recipe": self.recipe,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the ensemble anew of what was pickled."""
        self.__init__(**state)  # type: ignore[misc]

    def _hold(self, layer: MeanOfMembers, strategy: str) -> None:
        check_members(layer.members)
        self._layer, self._strategy = layer, strategy
        self._run = self._strategies[strategy](layer.run_one, layer.members)
        self._outputs = self._compile(layer.run_one.outputs)
        self._check = OutputCheck(layer.run_one, layer.members, self._check_outputs, allow_equal=self._allow_equal)
        self._predicting: dict[str, Any] = {}

    @staticmethod
    def _compile(run: Callable[..., Any]) -> Any:
        """Return what a cascade runs members by."""
        return run

    def _are_inputs(self, x: Any) -> bool:
        """Return whether something is a model's inputs, all examples in one, and no iterable of batches."""
        if not isinstance(x, list | tuple):
            return isinstance(x, Mapping) or hasattr(x, "shape")
        inputs = getattr(self._layer.run_one.model, "inputs", None)
        return all(hasattr(each, "shape") for each in x) and (inputs is None or len(inputs) == len(x) > 1)

    def _predict_batch(self, x: Any, *, log: bool) -> NDArray[Any]:
        return np.asarray(ops.convert_to_numpy(self._compiled(x, x, log=log).predict_on_batch(x)))

    def _compiled(self, x: Any, batch: Any, *, log: bool) -> Any:
        """Return the model that `functional` gives, made once for each shape and type of examples."""
        kinds = [(tuple(array.shape), str(array.dtype)) for array in keras.tree.flatten(x)]
        if not all(shape[0] for shape, _ in kinds):
            raise DataError(f"predict needs at least one example, got x of shape {[shape for shape, _ in kinds]}")
        self._check((batch,), {})
        kind = repr(([(shape[1:], dtype) for shape, dtype in kinds], log))
        if kind not in self._predicting:
            self._predicting[kind] = self.functional(x, log=log)
        return self._predicting[kind]


def _said(log: bool) -> dict[str, bool]:
    """Return what the layer is told; nothing where that is its default, which a saved model need not hold."""
    return {"log": True} if log else {}


def _check_model(model: Any) -> None:
    """Refuse what is no model of Keras, and parts that run or keep what is not among its weights."""
    if not isinstance(model, keras.Layer):
        kind = type(model)
        raise DataError(
            f"model must be a model of Keras 3, got {kind.__name__} of {kind.__module__.partition('.')[0]}: build it "
            "with keras, not with tf_keras or another framework"
        )
    for layer in model._flatten_layers():
        if type(layer).__name__ in ("TorchModuleWrapper", "TFSMLayer"):
            raise DataError(
                f"{layer.name!r} is a {type(layer).__name__}, which runs weights of its own: assign each member by "
                "model.set_weights, and average predictions with snapcore.ensemble.combine"
            )
        if getattr(layer, "stateful", False):
            raise DataError(f"{layer.name!r} keeps states from batch to batch: build the model with stateful=False")
        if hasattr(layer, "get_vocabulary") and not layer.get_vocabulary(include_special_tokens=False):
            raise DataError(f"{layer.name!r} has no vocabulary, and members hold none: adapt it, or pass vocabulary=")


def _fitting(members: Iterable[Sequence[NDArray[Any]]], model: Any) -> Iterator[list[NDArray[Any]]]:
    own = named_weights(model)
    for number, arrays in enumerate(members, 1):
        names = [*own, *(f"{position:03d}" for position in range(len(own), len(arrays)))]
        yield fitted(own, dict(zip(names, map(np.asarray, arrays), strict=False)), f"member {number}")


def _inputs(model: Any, x: Any) -> Any:
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else getattr(model, "input", None)
    if inputs is not None:
        return keras.tree.map_structure(_input_like, inputs)
    if x is None:
        raise DataError(f"{model.name} does not say what its inputs are: pass one batch of them")
    if isinstance(x, Mapping):
        return {name: _input_of(array, name) for name, array in x.items()}
    return keras.tree.map_structure(_input_of, x)


def _input_like(given: Any) -> Any:
    return keras.Input(batch_shape=(None, *given.shape[1:]), dtype=given.dtype, name=given.name, sparse=given.sparse)


def _input_of(batch: Any, name: str | None = None) -> Any:
    tensor = ops.convert_to_tensor(batch[:1])
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    dtype = keras.config.floatx() if dtype == "float64" else dtype  # as `predict` feeds it
    return keras.Input(batch_shape=(None, *tensor.shape[1:]), dtype=dtype, name=name)
