"""Several members, one function: the mean of their probabilities."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from snapcore import DataError
from snapcore.ensemble import (
    ALREADY_PROBABILITIES,
    ROUNDS,
    TOLERANCE,
    Directory,
    TuningReport,
    are_probabilities,
    check_activation,
    check_members,
    check_strategy,
    member_files,
    refuse_one_output,
    tune,
)
from snapcore.store import map_tensors
from snapcore_jax.strategies import STRATEGIES, Batch, Found, Weights, partition
from snapcore_jax.trees import with_leaves

Activation = Callable[[jax.Array], jax.Array]

_ACTIVATIONS: dict[str, Activation] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda outputs: outputs,
}

_HALF = (jnp.float16, jnp.bfloat16)  # averaged in float32


class SnapshotEnsemble:
    """Average the members' probabilities: h(x) = 1/m · Σ softmax of each of the last m members.

    Calling it gives mean probabilities, shape [batch, …, classes]; `members(…)` gives each member's, with the member
    axis first. Both are compiled, once for every shape of batch. `tune(…)` measures the strategies on a batch and
    keeps the fastest.

    Arguments:
        members: each member's variables, trees of one structure. `SnapshotEnsemble.load` reads them from runs.
        apply_fn: `apply_fn(variables, *args, **kwargs)` gives one member's outputs in evaluation mode: no dropout, and
            batch normalisation by the statistics in the variables.
        activation: from outputs to probabilities: `"softmax"` over the last axis, `"sigmoid"`, `"identity"` or a
            callable.
        output: picks the array when `apply_fn` returns something else, such as `lambda o: o.logits`.
        strategy: `"loop"`, one member after the other; `"stacked"`, all at once by `jax.vmap`; `"map"`, one at a time
            by `jax.lax.map`, the least memory; `"sharded"`, spread over this process's devices.

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
        output: Callable[[Any], jax.Array] | None = None,
        strategy: str = "loop",
    ) -> None:
        check_activation(activation)
        check_strategy(strategy, STRATEGIES)
        self._activation = _ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self._apply, self._output = apply_fn, output
        parts = [partition(member) for member in members]
        check_members(parts)
        self._members, self._static = [weights for weights, _ in parts], parts[0][1]
        for number, (_, static) in enumerate(parts, 1):
            if static != self._static:
                raise DataError(
                    f"members must differ in the values of arrays alone, but member {number} has another structure "
                    "than the first, or other values that are no arrays: make those arrays"
                )
        self._softmax = self._unchecked = activation == "softmax"
        self._strategy = strategy
        self._run = STRATEGIES[strategy](self._member, self._members)

    @classmethod
    def load(
        cls,
        directories: Directory | Iterable[Directory],
        apply_fn: Callable[..., Any],
        *,
        like: Any,
        last: int | None = None,
        activation: str | Activation = "softmax",
        output: Callable[[Any], jax.Array] | None = None,
        strategy: str = "loop",
    ) -> Self:
        """Load the members of one run, or of several.

        Arguments:
            directories: a run directory, or several; every file is checked against its digest.
            apply_fn: gives one member's outputs in evaluation mode, see `SnapshotEnsemble`.
            like: variables with the structure, shapes, dtypes and shardings that the members are to have: a model, or
                what `jax.eval_shape` gives of one. Random keys in it are every member's.
            last: how many members of each run, counted from its end; default all. Unfinished ones are left out.
            activation: from outputs to probabilities, see `SnapshotEnsemble`.
            output: picks the array when `apply_fn` returns something else.
            strategy: how the members are run, see `SnapshotEnsemble`.

        Raises:
            StoreError: a directory holds no run, or fewer than `last` members.
            CorruptSnapshotError: a file is not what was written.
            DataError: a member's names and shapes are not those of `like`, it was written by another framework, or an
                argument is unknown.
        """
        files = member_files(directories, framework="jax", last=last)
        members = (_loaded(file, like) for file in files)
        return cls(members, apply_fn, activation=activation, output=output, strategy=strategy)

    @property
    def strategy(self) -> str:
        """How the members are run."""
        return self._strategy

    def __len__(self) -> int:
        """Return how many members there are."""
        return len(self._members)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Return the members' mean probabilities.

        Arguments:
            *args: go to `apply_fn`. Arrays are traced; other values (flags, text, numbers) are compiled for.
            **kwargs: the same.

        Raises:
            DataError: softmax cannot be right, since the first batch's outputs already are probabilities, or there is
                one output.
        """
        return self._checked(self._run.mean(partition((args, kwargs))))

    def members(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Return each member's probabilities, shape [members, batch, …]."""
        return self._checked(self._run.each(partition((args, kwargs))))

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

        def run(name: str) -> jax.Array:
            if name not in made:
                made[name] = STRATEGIES[name](self._member, self._members)
            return self._checked(made[name].mean(batch)).block_until_ready()

        report = tune(run, list(STRATEGIES), to_host=np.asarray, tolerance=tolerance, rounds=rounds)
        self._strategy, self._run = report.chosen, made[report.chosen]
        return report

    def _member(self, weights: Weights, batch: Batch) -> Found:
        arrays, static = batch
        args, kwargs = static.combine(arrays)
        outputs = self._apply(self._static.combine(weights), *args, **kwargs)
        if self._output is not None:
            outputs = self._output(outputs)
        suspect: Any = False
        if self._softmax:
            refuse_one_output(outputs.shape)
            if jnp.issubdtype(outputs.dtype, jnp.floating):
                suspect = are_probabilities(outputs.astype(jnp.float32), half=outputs.dtype in _HALF)
        probabilities = self._activation(outputs.astype(jnp.float32) if outputs.dtype in _HALF else outputs)
        return probabilities, jnp.asarray(suspect)

    def _checked(self, found: Found) -> jax.Array:
        probabilities, suspect = found
        if self._unchecked and not isinstance(suspect, Tracer):  # inside jax.jit there is no value to look at
            if suspect:
                raise DataError(ALREADY_PROBABILITIES)
            self._unchecked = False
        return probabilities


def _loaded(file: Path, like: Any) -> Any:
    tensors = map_tensors(file)
    for name, array in tensors.items():
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise DataError(
                f"{name!r} of {file} is {array.dtype}, which JAX would truncate: "
                "call jax.config.update('jax_enable_x64', True) first"
            )
    return with_leaves(like, tensors, str(file), random=False)
