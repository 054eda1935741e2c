"""What was fitted on held-out data, kept apart from the members: weights, a temperature, and when to stop early."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from snapcore.ensemble.combine import pool
from snapcore.ensemble.predictions import Predictions
from snapcore.ensemble.scoring import tempered
from snapcore.errors import CorruptSnapshotError, DataError, StoreError
from snapcore.store import atomic_write, read_regular, seal, unseal

RULES = ("probability", "margin", "interval")
"""How a cascade tells that an example is sure enough; see `fit_cascade`."""

_FORMAT = "snapcore recipe 1"
_LONGEST = 2**20
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Fitted:
    """On what a recipe was fitted, and what it gained there.

    Attributes:
        rows: how many labels counted.
        split: the part of the data, such as `"held-out"`; None where the predictions did not say.
        gain: how much lower the NLL per row is (the root mean squared error of values) than with equal weights and
            without a temperature; None where it cannot be told, or is not finite.
        how: `"in-sample"`, on the rows that it was fitted on; or `"2-fold, 5 times"`, each half of the examples by what
            was fitted on the other, where there are fewer than 500 examples.
        test: the same on test data, where that was asked; nothing is fitted on it.
    """

    rows: int
    split: str | None = None
    gain: float | None = None
    how: str = "in-sample"
    test: float | None = None


@dataclass(frozen=True)
class Cascade:
    """When an example needs no further member; members are asked from the last to the first.

    Attributes:
        rule: one of `RULES`.
        threshold: in 0..1; an example stops at the first stage whose score is at least this.
        temperatures: of each stage, the first being that of the last member alone.
    """

    rule: str
    threshold: float
    temperatures: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise DataError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if not 0 <= self.threshold <= 1:
            raise DataError(f"threshold must be in 0..1, got {self.threshold}")
        if not all(0 < each < np.inf for each in self.temperatures):
            raise DataError(f"temperatures must be above 0 and finite, got {list(self.temperatures)}")


@dataclass(frozen=True)
class Recipe:
    """How members become one prediction: their weights, the temperature of what is pooled, and a cascade.

    Attributes:
        weights: one per member, in the members' order; they sum to 1.
        temperature: what pooled log-probabilities are divided by; 1 changes nothing.
        cascade: when to stop early; None asks all members.
        fitted: where that comes from; None for a recipe made by hand.
        members: the SHA-256 of each member's file, where the predictions named them: a recipe fits no other members.

    Raises:
        DataError: weights that are negative, all 0 or not finite, or a temperature that is not above 0.

    Example:
        >>> Recipe(weights=(1, 3)).weights
        (0.25, 0.75)
    """

    weights: tuple[float, ...]
    temperature: float = 1.0
    cascade: Cascade | None = None
    fitted: Fitted | None = None
    members: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shares = np.asarray(self.weights, np.float64)
        if shares.ndim != 1 or not shares.size or not (np.isfinite(shares).all() and shares.min() >= 0 < shares.max()):
            raise DataError(f"weights must be finite, not negative and not all 0, got {self.weights}")
        if not 0 < self.temperature < np.inf:
            raise DataError(f"temperature must be above 0 and finite, got {self.temperature}")
        if self.members is not None and len(self.members) != len(self.weights):
            raise DataError(f"members must be as many as weights, got {len(self.members)} and {len(self.weights)}")
        stages = np.count_nonzero(shares)
        if self.cascade is not None and len(self.cascade.temperatures) != stages:
            raise DataError(
                f"a cascade needs a temperature for each of {stages} stages, got {len(self.cascade.temperatures)}"
            )
        if abs(sum(map(float, shares)) - 1) > _ROUNDING:  # else a file would give back other last bits
            shares = shares / shares.max()  # whose sum can neither overflow nor vanish
            shares /= shares.sum()
        object.__setattr__(self, "weights", tuple(map(float, shares)))
        object.__setattr__(self, "temperature", float(self.temperature))

    def apply(self, predictions: Predictions) -> npt.NDArray[np.float32]:
        """Return what all members with a weight predict together, at the recipe's temperature.

        Args:
            predictions: of the same members, for any examples.

        Returns:
            [examples, …, classes], log-probabilities for classes and labels; values, or mean and variance, for others.

        Raises:
            DataError: the predictions are of other members.
        """
        self.check(predictions)
        result = np.empty(predictions.shape[1:], np.float32)
        for rows, block in predictions.blocks():
            pooled = pool(predictions.kind, block, np.asarray(self.weights))
            result[rows] = tempered(predictions.kind, pooled, self.temperature)
        return result

    def check(self, predictions: Predictions) -> None:
        """Check that predictions are those of the members that the recipe is for.

        Raises:
            DataError: there are more or fewer members, or others.
        """
        if len(predictions) != len(self.weights):
            raise DataError(f"the recipe is for {len(self.weights)} members, got predictions of {len(predictions)}")
        if None not in (self.members, predictions.members) and self.members != predictions.members:
            raise DataError("the recipe is for other members, or they have changed since: fit it anew")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON that carries its own SHA-256, whole or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        content = seal({"format": _FORMAT, **msgspec.to_builtins(self)})
        try:
            with atomic_write(Path(path)) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise StoreError(f"{path} could not be written: {error.strerror or error}; choose another") from error

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            StoreError: there is no such file, or it cannot be read.
            CorruptSnapshotError: it is not what was written.
        """
        try:
            content = unseal(read_regular(Path(path), limit=_LONGEST, follow=True), path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(f"{path} does not exist; check the path") from error
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}; move it away") from error
        if content.pop("format", None) != _FORMAT:
            raise CorruptSnapshotError(f"{path} is not a recipe; snapcore select writes one")
        try:
            return cls(**_fields(content))
        except (DataError, TypeError, msgspec.ValidationError) as error:
            raise CorruptSnapshotError(f"{path} is not a recipe as it was written: {error}; fit it anew") from error

    def with_cascade(self, cascade: Cascade) -> "Recipe":
        """Return the same recipe with a cascade."""
        return replace(self, cascade=cascade)


def as_recipe(recipe: "Recipe | str | os.PathLike[str]") -> Recipe:
    """Return a recipe, or read it from a file.

    Raises:
        StoreError, CorruptSnapshotError: see `Recipe.open`.
    """
    return recipe if isinstance(recipe, Recipe) else Recipe.open(recipe)


def _fields(content: Mapping[str, Any]) -> dict[str, Any]:
    types = {
        "weights": tuple[float, ...],
        "temperature": float,
        "cascade": Cascade | None,
        "fitted": Fitted | None,
        "members": tuple[str, ...] | None,
    }
    return {name: msgspec.convert(value, types.get(name, float)) for name, value in content.items()}
