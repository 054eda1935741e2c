"""From members' outputs to one prediction in a framework's own operations: what the four adapters' ensembles share.

Probabilities are averaged as they are. Where their logarithms are wanted, or a temperature is to be applied, the mean
is taken in log space: what underflows as a probability is exact there, and has a gradient.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from math import inf
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from snapcore.ensemble.cascade import cascade_batch
from snapcore.ensemble.members import Directory
from snapcore.ensemble.outputs import are_probabilities, check_pairs, softmax_axis
from snapcore.ensemble.recipe import Recipe, as_recipe
from snapcore.errors import DataError

_LOWEST = -1e30  # stands for ln 0 where it is subtracted from itself; float32 has room below


class Operations(Protocol):
    """What `Pooling` computes with, on arrays of a framework."""

    # ruff: noqa: D102
    @property
    def softmax(self) -> Callable[[Any, int], Any]: ...
    @property
    def log_softmax(self) -> Callable[[Any, int], Any]: ...
    @property
    def sigmoid(self) -> Callable[[Any], Any]: ...
    @property
    def log_sigmoid(self) -> Callable[[Any], Any]: ...
    @property
    def exp(self) -> Callable[[Any], Any]: ...
    @property
    def log(self) -> Callable[[Any], Any]: ...
    @property
    def expm1(self) -> Callable[[Any], Any]: ...
    @property
    def where(self) -> Any: ...  # (condition, yes, no), and what else it takes, as `mean`: (values, axis)
    @property
    def maximum(self) -> Callable[[Any, Any], Any]:
        """Of two arrays, or of one and a number, as `minimum`."""
        ...

    @property
    def minimum(self) -> Callable[[Any, Any], Any]: ...
    @property
    def mean(self) -> Any: ...
    @property
    def stack(self) -> Any: ...  # (arrays, axis)
    @property
    def stop_gradient(self) -> Callable[[Any], Any]: ...


@dataclass(frozen=True)
class Pooling:
    """How an ensemble's members become one prediction.

    Arguments:
        ops: the framework's operations.
        activation: from outputs to probabilities: softmax, sigmoid, identity or a callable. Or gaussian: outputs
            [..., 2 · values], means and then ln variances, become [..., values, 2], a mean and a variance each, and
            [..., 2] where there is one value; what is pooled is the mixture's.
        axis: of the classes, as the user passed it; see `softmax_axis`, as for `classes_last`.
        classes_last: whether the classes are the last axis of whatever outputs by convention.
        recipe: the members' weights, and the temperature of what is pooled; None for equal weights and no temperature.

    Raises:
        DataError: the recipe has a temperature, and the activation is a callable or gaussian.
    """

    ops: Operations
    activation: str | Callable[[Any], Any]
    axis: int | None = None
    classes_last: bool = True
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self._temperature != 1 and (callable(self.activation) or self.activation == "gaussian"):
            name = "a callable" if callable(self.activation) else repr(self.activation)
            raise DataError(
                f"a recipe with a temperature needs activation='softmax', 'sigmoid' or 'identity', got {name}: pass "
                "one of these names"
            )

    @property
    def _temperature(self) -> float:
        return 1.0 if self.recipe is None else self.recipe.temperature

    def alone(self) -> "Pooling":
        """Return what gives a member's own probabilities, without the recipe for all of them."""
        return replace(self, recipe=None)

    def in_logs(self, log: bool) -> bool:
        """Return whether members are pooled as log-probabilities, where `log` says that the result is to be that.

        Raises:
            DataError: as for `check_log`.
        """
        self.check_log(log)
        return log or self._temperature != 1

    def check_log(self, log: bool) -> None:
        """Refuse `log=True` of means and variances.

        Raises:
            DataError: there are no probabilities.
        """
        if log and self.activation == "gaussian":
            raise DataError(
                "log=True is for probabilities, and activation='gaussian' gives means and variances: leave it out"
            )

    def activated(self, outputs: Any, *, logs: bool = False) -> Any:
        """Return one member's probabilities, or their logarithms, of its outputs in float32 or float64.

        Raises:
            DataError: the classes' axis is not clear, or outputs are not pairs of a mean and a ln variance.
        """
        if self.activation == "gaussian":
            return self._moments(outputs)
        if self.activation == "softmax":
            return (self.ops.log_softmax if logs else self.ops.softmax)(outputs, self._axis(outputs))
        if self.activation == "sigmoid":
            return (self.ops.log_sigmoid if logs else self.ops.sigmoid)(outputs)
        found = self.activation(outputs) if callable(self.activation) else outputs
        return self.ops.log(found) if logs else found

    def pooled(self, members: Iterable[Any], *, log: bool = False) -> Any:
        """Return what members predict together: their weighted mean, at the recipe's temperature; or their mixture's.

        Arguments:
            members: what `activated` gave of each, with `logs=in_logs(log)`; one is held at a time.
            log: whether log-probabilities are wanted.
        """
        weights = repeat(1.0) if self.recipe is None else self.recipe.weights
        if self.activation == "gaussian":
            return self._mixture(weights, members)
        if not self.in_logs(log):
            return _mean(weights, members)
        pooled = self._tempered(self._log_mean(weights, members))
        return pooled if log else self.ops.exp(pooled)

    def pooled_stack(self, members: Any, *, log: bool = False) -> Any:
        """Return the same of one array, the member axis first."""
        if self.recipe is None and not log and self.activation != "gaussian":
            return self.ops.mean(members, 0)
        return self.pooled((members[position] for position in range(members.shape[0])), log=log)

    def cascade(
        self,
        ask: Callable[[int, npt.NDArray[np.int64]], npt.NDArray[Any]],
        shapes: Iterable[Sequence[int]],
        *,
        bucketed: bool = False,
        log: bool = False,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return what the recipe's cascade predicts for a batch, on the host, and how many members each example used.

        Arguments:
            ask: see `cascade_batch`, as for `bucketed`.
            shapes: of the arrays that the model is called with, whose first axis is the batch.
            bucketed: for compilers.
            log: whether log-probabilities are wanted.

        Raises:
            DataError: there is no cascade, arrays differ in length, or outputs are not [batch, classes] under softmax.
        """
        if self.recipe is None or self.recipe.cascade is None:
            raise DataError("a cascade needs a recipe that has one: make it with fit_cascade, and pass it as recipe=")
        if self.activation not in ("softmax", "identity"):
            name = "a callable" if callable(self.activation) else repr(self.activation)
            raise DataError(f"a cascade needs activation='softmax', got {name}: call the ensemble itself")

        def checked(index: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
            logs = ask(index, rows)
            if logs.ndim != 2 or len(logs) != len(rows) or self.axis not in (None, 1, -1):
                raise DataError(
                    f"a cascade needs outputs [batch, classes], got shape {logs.shape} of {len(rows)} examples, and "
                    f"axis={self.axis}: call the ensemble itself"
                )
            # With identity the model is to end in a softmax of its own.
            if self.activation == "identity" and logs.size and not are_probabilities(np.exp(logs), half=True):
                raise DataError(
                    "a cascade needs probabilities of classes, and with activation='identity' the outputs are others: "
                    "pass 'softmax' for logits, or call the ensemble itself"
                )
            return logs

        found, used = cascade_batch(checked, _batch_size(shapes), self.recipe, bucketed=bucketed)
        return found if log else np.exp(found), used

    def _axis(self, outputs: Any) -> int:
        return softmax_axis(outputs.shape, self.axis, classes_last=self.classes_last)

    def _moments(self, outputs: Any) -> Any:
        """Return a mean and a variance of each value, [..., values, 2], or [..., 2] of one value."""
        check_pairs(outputs.shape)
        values = outputs.shape[-1] // 2
        mean, log_variance = outputs[..., :values], outputs[..., values:]
        if values == 1:
            mean, log_variance = mean[..., 0], log_variance[..., 0]
        return self.ops.stack([mean, self.ops.exp(log_variance)], -1)

    def _mixture(self, weights: Iterable[float], members: Iterable[Any]) -> Any:
        """Return mean and variance of Σ w N(m, v) / Σ w; the variance is that within members, and that between them.

        Source: West, Updating mean and variance estimates: an improved method, CACM 1979.
        """
        weighed = 0.0
        mean: Any = 0.0
        spread: Any = 0.0
        for weight, member in zip(weights, members, strict=False):
            if not weight:
                continue
            weighed += weight
            off = member[..., 0] - mean
            mean = mean + off * (weight / weighed)
            between = off * (member[..., 0] - mean)  # 0 of the first, whose mean this is
            spread = spread + (member[..., 1] + between) * weight
        return self.ops.stack([mean, spread / weighed], -1)

    def _tempered(self, logs: Any) -> Any:
        temperature = self._temperature
        if temperature == 1:
            return logs
        if self.activation != "sigmoid":
            return self.ops.log_softmax(logs / temperature, self._axis(logs))
        logs = self.ops.minimum(logs, 0.0)  # rounding may leave it above
        return self.ops.log_sigmoid((logs - self.ops.log(-self.ops.expm1(logs))) / temperature)

    def _log_mean(self, weights: Iterable[float], members: Iterable[Any]) -> Any:
        """Return ln(Σ w e^l / Σ w), with the largest l so far taken out of the sum, and no gradient through it."""
        ops, weighed = self.ops, 0.0
        total: Any = None
        top: Any = None
        for weight, logs in zip(weights, members, strict=False):
            if not weight:
                continue
            values = ops.stop_gradient(logs)
            highest = ops.maximum(values, _LOWEST if top is None else top)
            part = ops.exp(logs - highest)
            part = part if weight == 1 else part * weight
            total = part if total is None else total * ops.exp(top - highest) + part
            top, weighed = highest, weighed + weight
        none = total <= 0  # which NaN is not
        return ops.where(none, -inf, top + ops.log(ops.where(none, weighed, total) / weighed))


def _mean(weights: Iterable[float], members: Iterable[Any]) -> Any:
    weighed = 0.0
    total: Any = None
    for weight, member in zip(weights, members, strict=False):
        if not weight:
            continue
        part = member if weight == 1 else member * weight
        total = part if total is None else total + part  # not in place: the first may be the caller's own
        weighed += weight
    return total / weighed


def checked_recipe(recipe: Recipe | Directory | None, n_members: int) -> Recipe | None:
    """Return the recipe of an ensemble, read from its file where that is given.

    Raises:
        StoreError, CorruptSnapshotError: it cannot be read.
        DataError: it has another number of weights than there are members.
    """
    found = None if recipe is None else as_recipe(recipe)
    if found is not None and len(found.weights) != n_members:
        raise DataError(
            f"the recipe is for {len(found.weights)} members, got {n_members}: SnapshotEnsemble.load(…, recipe=…) "
            "loads its own"
        )
    return found


def _batch_size(shapes: Iterable[Sequence[int]]) -> int:
    """Return the length of the first axis that all shapes have in common; a number has none."""
    lengths = sorted({shape[0] for shape in shapes if len(shape)})
    if len(lengths) != 1:
        raise DataError(
            f"a cascade takes examples out of all arrays it is given, so their first axis must be the batch, got "
            f"lengths {lengths}: have the model hold the others"
        )
    return lengths[0]
