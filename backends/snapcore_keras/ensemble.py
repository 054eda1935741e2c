"""Several members, one model: the mean of their probabilities."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    TuningReport,
    check_members,
    check_strategy,
    member_files,
    refuse_like,
    tune,
)
from snapcore.store import map_tensors
from snapcore_keras.activations import Activation, resolved
from snapcore_keras.first_batch import OutputCheck, is_symbolic
from snapcore_keras.layer import MeanOfMembers
from snapcore_keras.state import fitted, named_weights
from snapcore_keras.strategies import Forward, Loop, Stacked, Strategy, Weights


class SnapshotEnsemble:
    """Average the members' probabilities: h(x) = 1/m · Σ softmax of each of the last m members.

    In evaluation mode: no dropout, and batch normalisation by each member's own statistics. Members are loaded with
    `SnapshotEnsemble.load`. What runs them is the model itself, called in a `keras.StatelessScope` with each member's
    weights instead of its own: so it is not changed, and may be trained on; nor is what it would assign kept.

    Calling it gives mean probabilities, shape [batch, …, classes]; `members(…)` gives each member's, with the member
    axis first; `predict(…)` gives the mean of any number of examples in NumPy, compiled by Keras. `functional()` is a
    model to save or export. `tune(…)` measures the strategies on a batch and keeps the fastest.

    Arguments:
        members: each member's weights, arrays in the order of `model.weights`, as `model.get_weights()` gives them.
        model: built, of any kind: functional, sequential or a subclass.
        activation: from outputs to probabilities: `"softmax"` over the last axis, `"sigmoid"`, `"identity"` or a
            callable. `"auto"` reads `from_logits` of the compiled loss, without one looks at the last layer, and is
            softmax if neither decides. It is checked against the first member's outputs for the first batch, or for
            zeros where a model or graph is being built.
        output: picks the tensor when the model returns something else, such as `lambda outputs: outputs[0]`.
        strategy: `"loop"`, one member after the other; or `"stacked"`, all in one vectorised call, which needs the
            weights a second time, and Keras to run on JAX or PyTorch.

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

    _framework: ClassVar[str] = "keras"
    _strategies: ClassVar[Mapping[str, Callable[[Forward, Sequence[Weights]], Strategy]]] = {
        "loop": Loop,
        "stacked": Stacked,
    }

    def __init__(
        self,
        members: Iterable[Sequence[NDArray[Any]]],
        model: Any,
        *,
        activation: str | Activation = "auto",
        output: Callable[[Any], Any] | None = None,
        strategy: str = "loop",
    ) -> None:
        check_strategy(strategy, self._strategies)
        activation, check = resolved(activation, model, whole=output is None)
        self._layer = MeanOfMembers(model, _fitting(members, model), activation=activation, output=output)
        check_members(self._layer.members)
        self._strategy, self._run = strategy, self._strategies[strategy](self._layer.run_one, self._layer.members)
        self._check = OutputCheck(self._layer.run_one, self._layer.members[0], check)
        self._predicting: dict[str, Any] = {}

    @classmethod
    def load(
        cls,
        directories: Directory | Iterable[Directory],
        model: Any,
        *,
        like: None = None,
        last: int | None = None,
        activation: str | Activation = "auto",
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
        check_strategy(strategy, cls._strategies)
        refuse_like(like)
        files = member_files(directories, framework=cls._framework, last=last)
        own = named_weights(model)
        members = (fitted(own, map_tensors(file), str(file)) for file in files)
        return cls(members, model, activation=activation, output=output, strategy=strategy)

    @property
    def strategy(self) -> str:
        """How the members are run."""
        return self._strategy

    def __len__(self) -> int:
        """Return how many members there are."""
        return len(self._layer.members)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the members' mean probabilities, a tensor of Keras' backend.

        Arguments:
            *args: go to the model. Given a `keras.Input`, this is a layer of the model that is being built.
            **kwargs: the same; `training` is always False.

        Raises:
            DataError: the first batch's outputs are not what the activation takes them for, or the strategy cannot run
                the model.
        """
        self._check(args, kwargs)
        return self._layer(*args, **kwargs) if is_symbolic((args, kwargs)) else self._run.mean(args, kwargs)

    def members(self, *args: Any, **kwargs: Any) -> Any:
        """Return each member's probabilities, shape [members, batch, …]."""
        self._check(args, kwargs)
        return self._run.each(args, kwargs)

    def predict(self, x: Any, batch_size: int = 32) -> NDArray[Any]:
        """Return the members' mean probabilities of any number of examples, by Keras' compiled `predict`.

        The strategy plays no part in it: it is the model that `functional` gives.

        Arguments:
            x: an array of examples, or a list or dict of arrays as the model takes them.
            batch_size: how many to run at once, 1 or more.

        Raises:
            DataError: there are no examples, or the first batch's outputs are not what the activation takes them for.
        """
        kinds = [(tuple(array.shape), str(array.dtype)) for array in keras.tree.flatten(x)]
        if not all(shape[0] for shape, _ in kinds):
            raise DataError(f"predict needs at least one example, got x of shape {[shape for shape, _ in kinds]}")
        self._check((keras.tree.map_structure(lambda array: array[:batch_size], x),), {})
        kind = repr([(shape[1:], dtype) for shape, dtype in kinds])
        if kind not in self._predicting:
            self._predicting[kind] = self.functional(x)
        return np.asarray(self._predicting[kind].predict(x, batch_size=batch_size, verbose=0))

    def functional(self, x: Any = None) -> Any:
        """Return a functional model whose outputs are the mean probabilities, to `save`, `export` or build on.

        It shares the members' weights with the ensemble, and runs them one after the other. To be saved as `.keras`,
        a model of a class of your own must be registered with Keras; to be exported it need not be. Keras exports a
        SavedModel on TensorFlow, and on JAX where TensorFlow is installed; on PyTorch `export(…, format="torch")`.

        Arguments:
            x: one batch, for a model that does not say what its inputs are, such as one of a class of your own.

        Raises:
            DataError: neither the model nor `x` says what the inputs are, or the outputs of `x`, without it of a batch
                of zeros, are not what the activation takes them for.
        """
        inputs = _inputs(self._layer.run_one.model, x)
        self._check((inputs if x is None else x,), {})
        return keras.Model(inputs, self._layer(inputs), name="snapshot_ensemble")

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
