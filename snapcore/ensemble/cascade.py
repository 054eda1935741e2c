"""Ask the members one after the other, and stop where an example is sure enough: most of an ensemble for less."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from snapcore.ensemble.combine import LogMean
from snapcore.ensemble.fitting import RunsOffError, best_temperature, check_split
from snapcore.ensemble.predictions import Floats, Predictions
from snapcore.ensemble.recipe import RULES, Cascade, Fitted, Recipe
from snapcore.ensemble.scoring import tempered
from snapcore.errors import DataError


def fit_cascade(
    predictions: Predictions,
    *,
    tolerance: float,
    rule: str = "probability",
    recipe: Recipe | None = None,
    expected: bool = False,
) -> Recipe:
    """Find the threshold at which fewest members are asked, and the error stays within a tolerance.

    Members are asked from the last to the first, and their probabilities pooled as they come; stage k has k members.
    Each stage has a temperature of its own, fitted on the same rows: one member is more over-confident than several.
    Every threshold that makes a difference on these rows is tried.

    The error is counted on the labels, or with `expected` what all members together expect it to be: an answer y that
    is not their own, a, costs p(a) − p(y), by their probabilities at their temperature. With few rows the count is
    noise: of 1,000 some thirty have another answer from one member than from all, and which of these the labels side
    with moves the difference by half a point.

    What an example is asked:

    - `"probability"`: the largest probability, at the stage's temperature, is at least the threshold;
    - `"margin"`: its distance to the second largest is;
    - `"interval"`: the confidence (Student's t over the members so far, two-sided) that the leading class is above the
      second is. It takes two members at least.

    Args:
        predictions: of classes, [members, examples, classes], for held-out examples, with labels.
        tolerance: by how much the error may exceed that of all members, in percentage points; with 0 and `expected` all
            answers are theirs on these rows.
        rule: probability, margin or interval.
        recipe: whose weights to use; members without a weight are never asked. Equal by default.
        expected: whether the error is that which all members expect.

    Returns:
        The recipe with its `cascade`. Where examples of score 1 alone cost more than the tolerance, which no threshold
        mends, its threshold is 1.

    Raises:
        DataError: labels are missing, the kind is another, the split is test, the tolerance is negative, or the rule
            unknown.

    Source:
        Inoue, Adaptive ensemble prediction for deep neural networks based on confidence level, AISTATS 2019;
        Streeter, Approximation algorithms for cascading prediction models, ICML 2018.
    """
    if not tolerance >= 0:
        raise DataError(f"tolerance must be at least 0 percentage points, got {tolerance}")
    if rule not in RULES:
        raise DataError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    base = Recipe((1.0,) * len(predictions), members=predictions.members) if recipe is None else recipe
    base.check(predictions)
    check_split(predictions, base)
    _check_kind(predictions)
    labels = predictions.labels_of(slice(None))
    if predictions.ignore is not None:
        predictions = predictions.take(labels != predictions.ignore)
        labels = predictions.labels_of(slice(None))
    members = members_asked(base)
    temperatures: list[float] = []
    scores, answers = [], []
    stage = Stage([base.weights[index] for index in members], rule)
    for index in members:
        stage.add(predictions[index])
        try:
            temperatures.append(best_temperature(stage.logs, labels, near=(temperatures or [1.0])[-1]))
        except RunsOffError:  # as in a stage without errors, whose confidence is then left as it is
            temperatures.append(1.0)
        told = tempered("classes", stage.logs, temperatures[-1])
        scores.append(stage.score(told))
        answers.append(told.astype(np.float32).argmax(axis=1))  # as run_cascade, to the last bit
    costs = np.array([answer != labels for answer in answers], np.float64)
    if expected:
        whole = np.exp(tempered("classes", stage.logs, temperatures[-1]))
        costs = whole.max(axis=1) - whole[np.arange(len(labels)), answers]
    threshold = _cheapest(np.array(scores), costs, tolerance)
    if recipe is None:  # nothing else is fitted
        base = replace(base, fitted=Fitted(predictions.rows, predictions.split, gain=0.0))
    return base.with_cascade(Cascade(rule, threshold, tuple(temperatures)))


def run_cascade(predictions: Predictions, recipe: Recipe) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Give what a cascade predicts, and how many members it asks for each example.

    Args:
        predictions: of classes, of the members that the recipe is for.
        recipe: with a cascade; see `fit_cascade`.

    Returns:
        Log-probabilities [examples, classes], each example's at the temperature of its stage; and members used
        [examples], 1 … the members with a weight.

    Raises:
        DataError: the recipe has no cascade, or is for other members.
    """
    recipe.check(predictions)
    _check_kind(predictions)
    return cascade_batch(lambda index, rows: predictions[index][rows], predictions.examples, recipe)


def cascade_batch(
    ask: Callable[[int, npt.NDArray[np.int64]], npt.NDArray[np.floating]],
    examples: int,
    recipe: Recipe,
    *,
    bucketed: bool = False,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Run a cascade on one batch: each member sees only the examples that are left.

    Args:
        ask: from a member's index and positions of examples to its log-probabilities for them, [positions, classes].
        examples: how many there are.
        recipe: with a cascade.
        bucketed: whether positions are repeated until they are as many as the batch, or its half, quarter, eighth or
            sixteenth: a compiler sees five shapes at most.

    Returns:
        As `run_cascade`.

    Raises:
        DataError: the recipe has no cascade.
    """
    if recipe.cascade is None:
        raise DataError("the recipe has no cascade: make one with fit_cascade")
    members, rule = members_asked(recipe), recipe.cascade
    stage, rows = Stage([recipe.weights[index] for index in members], rule.rule), np.arange(examples)
    result, used = np.empty((0, 0), np.float32), np.zeros(examples, np.int64)
    for position, index in enumerate(members):
        if position and not rows.size:
            break
        asked = np.resize(rows, _bucket(len(rows), examples)) if bucketed else rows
        stage.add(np.asarray(ask(index, asked))[: len(rows)])
        logs = tempered("classes", stage.logs, rule.temperatures[position])
        if not position:
            result = np.empty(logs.shape, np.float32)
        leaves = (stage.score(logs) >= rule.threshold) | (position == len(members) - 1)
        result[rows[leaves]] = logs[leaves]
        used[rows[leaves]] = position + 1
        stage.keep(~leaves)
        rows = rows[~leaves]
    return result, used


def _bucket(left: int, examples: int) -> int:
    """Return the smallest of the batch's halves, down to its sixteenth, that holds what is left."""
    sizes = [-(-examples >> power) for power in range(4, -1, -1)]
    return next(size for size in sizes if size >= left)


def members_asked(recipe: Recipe) -> list[int]:
    """Return the indices of the members that a cascade asks, in its order."""
    return [index for index in reversed(range(len(recipe.weights))) if recipe.weights[index]]


class Stage:
    """What is known of some examples after k members, for a rule to judge.

    Args:
        weights: of the members, in the order in which they come.
        rule: of the cascade; `"interval"` looks at each member again, and all of them are kept for it.
    """

    def __init__(self, weights: Sequence[float], rule: str) -> None:
        self._weights = iter(enumerate(weights))
        self._rule, self._mean = rule, LogMean("cascade")
        self._members: list[Floats] = []
        self.logs: Floats = np.empty((0, 0))

    def add(self, member: npt.NDArray[np.floating]) -> None:
        """Take the next member's log-probabilities, [examples, classes]."""
        logs = member.astype(np.float64)
        self._mean.add(logs, *next(self._weights))
        if self._rule == "interval":
            self._members.append(logs)
        self.logs = self._mean.value()

    def keep(self, rows: npt.NDArray[np.bool_]) -> None:
        """Forget the other examples."""
        self._mean.keep(rows)
        self._members = [member[rows] for member in self._members]
        self.logs = self.logs[rows]

    def score(self, told: Floats) -> Floats:
        """Return how sure the rule is of each example, in 0..1.

        Args:
            told: what is predicted at this stage: `logs` at its temperature, [examples, classes].
        """
        if told.shape[1] == 1:
            return np.ones(len(told))
        rows, first = np.arange(len(told)), told.argmax(axis=1)
        largest = np.exp(told[rows, first])
        if self._rule == "probability":
            return np.asarray(np.minimum(largest, 1.0))
        others = told.copy()
        others[rows, first] = -np.inf
        second = others.argmax(axis=1)
        second = np.where(second == first, (first + 1) % told.shape[1], second)  # all others have probability 0
        if self._rule == "margin":
            return np.asarray(np.clip(largest - np.exp(told[rows, second]), 0.0, 1.0))
        return _confidence(np.array([np.exp(each[rows, first]) - np.exp(each[rows, second]) for each in self._members]))


def _confidence(leads: Floats) -> Floats:
    """Return the confidence that the mean of leads [members, examples] is above 0: Student's t, two-sided.

    P(|T| < t) for ν degrees of freedom is a polynomial in the sine and cosine of arctan(t / √ν).

    Source:
        Abramowitz, Stegun, Handbook of Mathematical Functions, 1964, equations 26.7.3 and 26.7.4.
    """
    freedom = len(leads) - 1
    if not freedom:
        return np.zeros(leads.shape[1])
    angle = np.arctan2(leads.mean(axis=0), leads.std(axis=0, ddof=1) * np.sqrt(freedom / len(leads)))
    sine, cosine = np.sin(angle), np.cos(angle)
    term = cosine if freedom % 2 else np.ones_like(cosine)
    total = np.zeros_like(cosine)
    for power in range(freedom % 2, freedom - 1, 2):  # of the cosine
        total += term
        term = term * cosine**2 * (power + 1) / (power + 2)
    within = (angle + sine * total) * 2 / np.pi if freedom % 2 else sine * total
    return np.asarray(np.clip(within, 0.0, 1.0))


def _cheapest(scores: Floats, costs: Floats, tolerance: float) -> float:
    """Return the lowest threshold, in 0..1, whose costs on [stages, examples] exceed the last stage's by the tolerance.

    An example leaves at the first stage whose score is at least the threshold, so as the threshold rises past the
    largest score so far, it moves on to the stage that beats it. Only these thresholds matter; the members asked
    for rise with them.
    """
    n_stages, n_examples = scores.shape
    # by how much the total changes as the threshold rises past `at`; at 0 it has passed nothing yet
    at, change = [np.array([-1.0])], [np.array([float(costs[0].sum())])]
    reached, here = scores[0].copy(), costs[0].copy()
    for stage in range(1, n_stages):
        # the last stage takes all that is left, whatever its score
        moved = np.ones(n_examples, bool) if stage == n_stages - 1 else scores[stage] > reached
        at.append(reached[moved])
        change.append(costs[stage][moved] - here[moved])
        here = np.where(moved, costs[stage], here)
        reached = np.maximum(reached, scores[stage])
    order = np.argsort(np.concatenate(at), kind="stable")
    places, totals = np.concatenate(at)[order], np.cumsum(np.concatenate(change)[order])
    allowed = costs[-1].sum() + tolerance * n_examples / 100 + 1e-9
    last_of_equal = np.append(places[1:] > places[:-1], True)
    fits = np.flatnonzero(last_of_equal & (totals <= allowed) & (places < 1))  # no threshold is above a score of 1
    if not fits.size:
        return 1.0
    first = int(fits[0])
    if not first:
        return 0.0
    # just above the scores that must move on
    above = float(places[first + 1]) if first + 1 < len(places) else 1.0
    middle = (float(places[first]) + above) / 2
    return middle if middle > places[first] else above


def _check_kind(predictions: Predictions) -> None:
    if predictions.kind != "classes" or len(predictions.shape) != 3:
        raise DataError(
            f"a cascade is for classes, [members, examples, classes], got kind {predictions.kind!r}, shape "
            f"{predictions.shape}"
        )
