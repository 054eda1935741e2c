"""Several members, one function: the mean of their probabilities."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import NDArray

from snapcore import DataError
from snapcore.ensemble import (
    ALREADY_PROBABILITIES,
    ROUNDS,
    TOLERANCE,
    Directory,
    Output,
    Pooling,
    Recipe,
    TuningReport,
    are_probabilities,
    check_activation,
    check_members,
    check_strategy,
    checked_recipe,
    pick,
    predict,
    recipe_files,
    refuse_equal_members,
    refuse_mapped,
    softmax_axis,
    tune,
)
from snapcore.store import map_tensors
from snapcore_jax.strategies import STRATEGIES, Batch, Static, Weights, loop, partition
from snapcore_jax.trees import holds_module, is_key, with_leaves

Activation = Callable[[jax.Array], jax.Array]

_HALF = (jnp.float16, jnp.bfloat16)  # averaged in float32


class _Operations:
    """Those that members are pooled with."""

    softmax = staticmethod(jax.nn.softmax)
    log_softmax = staticmethod(jax.nn.log_softmax)
    sigmoid = staticmethod(jax.nn.sigmoid)
    log_sigmoid = staticmethod(jax.nn.log_sigmoid)
    exp = staticmethod(jnp.exp)
    log = staticmethod(jnp.log)
    expm1 = staticmethod(jnp.expm1)
    where = staticmethod(jnp.where)
    maximum = staticmethod(jnp.maximum)
    minimum = staticmethod(jnp.minimum)
    mean = staticmethod(jnp.mean)
    stack = staticmethod(jnp.stack)
    stop_gradient = staticmethod(jax.lax.stop_gradient)


class SnapshotEnsemble:
    """Average the members' probabilities: h(x) = 1/m · Σ softmax of each of the last m members.

    Calling it gives mean probabilities, in the shape of the outputs, or with `log=True` their logarithms; `members(…)`
    gives each member's, with the member axis first. Both are compiled, once for every shape of batch. `predict(…)`
    gives the mean for all of a loader; `cascade(…)` asks each member only for the examples that need it. It has a
    length, and yields each member as an ensemble of one. `tune(…)` measures the strategies on a batch and keeps the
    fastest. It pickles, if the members and `apply_fn` do.

    With a recipe the mean is weighted, and what is pooled is brought to the recipe's temperature T: softmax(ln h / T)
    over the classes, or sigmoid(logit h / T) for each label.

    Arguments:
        members: each member's variables, trees of one structure. `SnapshotEnsemble.load` reads them from runs.
        apply_fn: `apply_fn(variables, *args, **kwargs)` gives one member's outputs in evaluation mode: no dropout, and
            batch normalisation by the statistics in the variables. Where the variables are a model that is called,
            such as a Flax NNX module, that is `operator.call`.
        activation: from outputs to probabilities: `"softmax"`, `"sigmoid"`, `"identity"` or a callable. Or
            `"gaussian"`, for outputs [..., 2 · values], means and then ln variances: a call gives the mixture's mean
            and variance, [..., values, 2], or [..., 2] of one value.
        axis: of the classes, for softmax; by default the last of outputs [batch, …, classes]. Convolutions of
            Equinox have it first, so with its modules it may be left out for outputs [batch, classes] alone.
        output: picks the array when `apply_fn` returns something else: a key or attribute such as `"logits"`, a
            position such as `0`, or a function.
        strategy: `"loop"`, one member after the other; `"stacked"`, all at once by `jax.vmap`; `"map"`, one at a time
            by `jax.lax.map`, the least memory; `"sharded"`, spread over this process's devices.
        allow_equal: whether members whose weights differ may give equal outputs for the first batch.
        recipe: the members' weights, as many as there are members, and the temperature.

    Raises:
        StoreError: there are no members.
        DataError: an argument is unknown, the members differ in more than the values of arrays, or the strategy cannot
            run them.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply_fn(params, x):
        ...     return x @ params["w"]
        >>> ensemble = SnapshotEnsemble([{"w": jnp.zeros((4, 3))}, {"w": jnp.ones((4, 3))}], apply_fn)
        >>> ensemble(jnp.ones((5, 4))).shape, ensemble.members(jnp.ones((5, 4))).shape
        ((5, 3), (2, 5, 3))

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, section 3.
    """

    def __init__(
        self,
        members: Iterable[Any],
        apply_fn: Callable[..., Any],
        *,
        activation: str | Activation = "softmax",
        axis: int | None = None,
        output: Output | None = None,
        strategy: str = "loop",
        allow_equal: bool = False,
        recipe: Recipe | Directory | None = None,
    ) -> None:
        check_activation(activation)
        check_strategy(strategy, STRATEGIES)
        if holds_module(apply_fn, "flax.nnx", "flax.linen") or not callable(apply_fn):
            raise DataError(
                f"apply_fn must be a function of (variables, x), got {type(apply_fn).__name__}: pass model.apply in "
                "Linen, and operator.call where the variables are the model"
            )
        trees = list(members)
        check_members(trees)
        parts = [partition(tree) for tree in trees]
        self._members, self._static = [weights for weights, _ in parts], parts[0][1]
        for number, (_, static) in enumerate(parts, 1):
            if static != self._static:
                raise DataError(
                    f"members must differ in the values of arrays alone, but member {number} has another structure "
                    "than the first, or other values that are no arrays: make those arrays"
                )
        self._options = {"activation": activation, "axis": axis, "output": output, "allow_equal": allow_equal}
        classes_last, found = not holds_module(trees[0], "equinox"), checked_recipe(recipe, len(trees))
        self._pooling = Pooling(_Operations(), activation, axis, classes_last=classes_last, recipe=found)
        self._output = output
        self._apply = apply_fn
        # Traced once for every shape, and looked at for the first; inline, it is compiled as if it stood there.
        self._outputs = jax.jit(self._one, static_argnums=2, inline=True)
        self._unchecked, self._undecided, self._zeros_passed = activation == "softmax", not allow_equal, False
        self._strategy = strategy
        self._run = STRATEGIES[strategy](self._member, self._members, self._pooling)

    @classmethod
    def load(
        cls,
        directories: Directory | Iterable[Directory],
        apply_fn: Callable[..., Any],
        *,
        like: Any,
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
            apply_fn: gives one member's outputs in evaluation mode, see `SnapshotEnsemble`.
            like: variables with the structure, shapes, dtypes and shardings that the members are to have: a model, or
                what `jax.eval_shape` gives of one. Random keys in it are every member's.
            last: how many members of each run, counted from its end; default all. Unfinished ones are left out.
            members: instead, the indices of each run's members to take, such as `[1, 3]`.
            activation: from outputs to probabilities, see `SnapshotEnsemble`, as `axis`.
            axis: of the classes.
            output: picks the array when `apply_fn` returns something else.
            strategy: how the members are run, see `SnapshotEnsemble`.
            mapped: left out; it is for PyTorch. JAX copies weights to its devices.
            allow_equal: whether members whose weights differ may give equal outputs for the first batch.
            recipe: or the path of its file: says which members are used, with which weights, at which temperature, and
                when a cascade stops. `last` and `members` are left out then; members without a weight are not loaded.
                `activation="identity"` takes a temperature for one of classes.

        Raises:
            StoreError: a directory holds no run, or not the members asked for; or there is no such recipe.
            CorruptSnapshotError: a file is not what was written.
            DataError: a member's names and shapes are not those of `like`, it was written by another framework, the
                recipe is for other members, or an argument is unknown.
        """
        refuse_mapped(mapped)
        files, used = recipe_files(directories, recipe, framework="jax", last=last, members=members)
        return cls(
            [_loaded(file, like) for file in files],
            apply_fn,
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
        return self._pooling.recipe

    def __len__(self) -> int:
        """Return how many members there are."""
        return len(self._members)

    def __iter__(self) -> Iterator[Self]:
        """Yield each member as an ensemble of one, which gives its probabilities and shares its weights."""
        alone = self._pooling.alone()
        run = loop(self._member, self._members[:1], alone)  # compiled once for all of them
        for weights in self._members:
            member = object.__new__(type(self))
            own = {"_members": [weights], "_pooling": alone, "_strategy": "loop", "_run": run.over((weights,))}
            vars(member).update(vars(self), **own)
            yield member

    def __call__(self, *args: Any, log: bool = False, **kwargs: Any) -> jax.Array:
        """Return the members' mean probabilities, weighted and tempered by the recipe if there is one.

        Arguments:
            *args: go to `apply_fn`. Arrays are traced; other values (flags, text, numbers) are compiled for.
            log: return log-probabilities, exact where probabilities underflow.
            **kwargs: go to `apply_fn`, as `args`.

        Raises:
            DataError: the first batch's outputs already are probabilities, or all members give the same; or `axis` or
                `output` is needed.
        """
        batch = partition((args, kwargs))
        self._check(batch)
        return self._run.mean(batch, log=log)

    def members(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Return each member's own probabilities, shape [members, batch, …], without weights and temperature."""
        batch = partition((args, kwargs))
        self._check(batch)
        return self._run.each(batch)

    def predict(self, batches: Iterable[Any] | jax.Array | NDArray[Any], *, log: bool = False) -> NDArray[Any]:
        """Return what a call gives for all batches of a loader, as one NumPy array.

        Arguments:
            batches: inputs x, or tuples or lists that begin with them, such as (x, y): what follows is not used. An
                array is one batch.
            log: return log-probabilities.

        Raises:
            DataError: there is no batch, or as for a call.
        """
        alone = isinstance(batches, jax.Array | np.ndarray)
        return predict(lambda x: np.asarray(self(x, log=log)), [batches] if alone else batches)

    def cascade(self, *args: Any, log: bool = False, return_used: bool = False, **kwargs: Any) -> Any:
        """Return mean probabilities by the recipe's cascade: each member runs on the examples that are left.

        Members are asked from the last to the first, and an example that is sure enough is asked no further; see
        `snapcore.ensemble.fit_cascade`. In float32. Compiled once for a batch and its half, quarter, eighth and
        sixteenth: what is left is filled up to these. That members differ is not checked, since that would ask them
        all.

        Arguments:
            *args: go to `apply_fn`. Of all arrays the first axis is the batch, also within trees.
            log: return log-probabilities.
            return_used: return also how many members each example used, a NumPy array of integers [batch].
            **kwargs: go to `apply_fn`, as `args`.

        Raises:
            DataError: the recipe has no cascade, outputs are not [batch, classes] under softmax, arrays are of several
                lengths, it is called inside `jax.jit`, or as for a call.
        """
        arrays, static = partition((args, kwargs))
        if any(isinstance(array, Tracer) for array in (*arrays, *chain(*self._members))):
            raise DataError("a cascade looks at values, and inside jax.jit there are none: call it outside")

        def ask(index: int, rows: NDArray[np.int64]) -> NDArray[Any]:
            some = [array[rows] if array.ndim else array for array in arrays]
            outputs = self._outputs(self._members[index], some, static)
            self._unchecked = self._check_probabilities(outputs)
            return np.asarray(self._activated(outputs, log=True))

        shapes = [array.shape for array in arrays]
        found, used = self._pooling.cascade(ask, shapes, bucketed=True, log=log)
        return (jnp.asarray(found), used) if return_used else jnp.asarray(found)

    def tune(self, *args: Any, tolerance: float = TOLERANCE, rounds: int = ROUNDS, **kwargs: Any) -> TuningReport:
        """Measure every strategy on a batch, keep the fastest that gives what the loop gives, and return the report.

        Arguments:
            *args: the batch, as for a call; measure what you will use, also its size.
            tolerance: the largest deviation from the loop, max |p − q| / max |q|, with which a strategy may be kept.
            rounds: the most samples of each, taken in turns: about 10 ms of calls, or one that lasts longer. After 5
                rounds slow strategies are passed over, and 2 s end it.
            **kwargs: as for a call.
        """
        batch, made = partition((args, kwargs)), {self._strategy: self._run}
        self._check(batch)

        def run(name: str) -> jax.Array:
            if name not in made:
                made[name] = STRATEGIES[name](self._member, self._members, self._pooling)
            return made[name].mean(batch).block_until_ready()

        report = tune(run, list(STRATEGIES), to_host=np.asarray, tolerance=tolerance, rounds=rounds)
        self._strategy, self._run = report.chosen, made[report.chosen]
        return report

    def _one(self, weights: Weights, arrays: list[Any], static: Static) -> jax.Array:
        args, kwargs = static.combine(arrays)
        returned = self._apply(self._static.combine(weights), *args, **kwargs)
        return jnp.asarray(pick(returned, self._output, lambda value: isinstance(value, jax.Array | np.ndarray)))

    def _member(self, weights: Weights, batch: Batch, log: bool) -> jax.Array:
        return self._activated(self._outputs(weights, *batch), log=log)

    def _activated(self, outputs: jax.Array, *, log: bool) -> jax.Array:
        outputs = outputs.astype(jnp.float32) if outputs.dtype in _HALF else outputs
        activated: jax.Array = self._pooling.activated(outputs, logs=log)
        return activated

    def _check(self, batch: Batch) -> None:
        """Look at the outputs for the first batch: of a traced one, which has no values, at those for zeros."""
        arrays, static = batch
        traced, unknown = (any(isinstance(array, Tracer) for array in each) for each in (arrays, chain(*self._members)))
        passed = not (self._unchecked or self._undecided)
        if passed or unknown or (traced and (self._zeros_passed or any(map(is_key, arrays)))):
            return
        with jax.ensure_compile_time_eval() if traced else nullcontext():
            if traced:
                arrays = [jnp.zeros(array.shape, array.dtype) for array in arrays]
            each = (self._outputs(weights, arrays, static) for weights in self._members)
            first = next(each)
            unchecked = self._check_probabilities(first)
            decided = True
            if self._undecided:
                cure = "have apply_fn use the variables that it is given; or allow_equal=True"
                decided = refuse_equal_members(chain([first], each), lambda: self._members, cure)
        self._zeros_passed = traced
        if not traced:
            self._unchecked, self._undecided = unchecked, not decided

    def _check_probabilities(self, first: jax.Array) -> bool:
        """Refuse outputs that already are probabilities, and return whether the next are to be looked at too."""
        if self._unchecked and jnp.issubdtype(first.dtype, jnp.floating):
            axis = softmax_axis(first.shape, self._pooling.axis, classes_last=self._pooling.classes_last)
            if are_probabilities(first.astype(jnp.float32), axis, half=first.dtype in _HALF):
                raise DataError(ALREADY_PROBABILITIES)
        return self._unchecked and not first.size

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: nothing that was compiled."""
        members = [self._static.combine(weights) for weights in self._members]
        own = {"members": members, "apply_fn": self._apply, "strategy": self._strategy, "recipe": self.recipe}
        return {**own, **self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the ensemble anew of what was pickled."""
        self.__init__(**state)  # type: ignore[misc]


def _loaded(file: Path, like: Any) -> Any:
    tensors = map_tensors(file)
    for name, array in tensors.items():
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise DataError(
                f"{name!r} of {file} is {array.dtype}, which JAX would truncate: "
                "call jax.config.update('jax_enable_x64', True) first"
            )
    return with_leaves(like, tensors, str(file), random=False)
