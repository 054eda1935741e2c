"""Members chosen, weighted and calibrated on held-out data.

All three minimise the negative log-likelihood per label of what the members predict together, or the squared error of
plain values. They see each member only as a row of likelihoods, and in logarithms, so that nothing underflows.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from snapcore.ensemble.combine import pool
from snapcore.ensemble.predictions import Floats, Predictions, log1mexp
from snapcore.ensemble.recipe import Fitted, Recipe
from snapcore.ensemble.scoring import score_predictions
from snapcore.ensemble.simplex import minimise
from snapcore.errors import DataError

FEW = 500
"""Below so many examples a gain is measured on the half that was not fitted on."""

_LOWEST, _HIGHEST = 1e-3, 1e3  # temperatures beyond these have run off
_NEVER = -1e30  # stands for ln 0 where it is multiplied by 0


class RunsOffError(DataError):
    """No finite temperature is best on these labels."""


def select(predictions: Predictions, *, size: int = 25) -> Recipe:
    """Choose members one after the other, each time the one that helps most; one may be chosen again.

    Starts with the best single member, adds `size` − 1 more, with replacement, and keeps the best of the ensembles on
    the way, the first of equals. Of members that help equally, one that was chosen before is taken, then the first. A
    member's weight is its share of the choices.

    Args:
        predictions: for held-out examples, with labels.
        size: how many choices at most.

    Raises:
        DataError: labels are missing, the split is test, or `size` is below 1.

    Example:
        >>> good, bad = [[0.9, 0.1], [0.2, 0.8]], [[0.1, 0.9], [0.8, 0.2]]
        >>> select(Predictions.from_probabilities([bad, good], [0, 1])).weights
        (0.0, 1.0)

    Source:
        Caruana, Niculescu-Mizil, Crew, Ksikes, Ensemble selection from libraries of models, ICML 2004.
    """
    if size < 1:
        raise DataError(f"size must be at least 1, got {size}")
    return _fitted(predictions, lambda part: _select(part, size))


def fit_weights(predictions: Predictions) -> Recipe:
    """Fit the weights under which the members' mean predicts best: a convex problem, solved to 1e-6.

    Args:
        predictions: for held-out examples, with labels.

    Raises:
        DataError: labels are missing, or the split is test.

    Example:
        >>> good, bad = [[0.9, 0.1], [0.2, 0.8]], [[0.1, 0.9], [0.8, 0.2]]
        >>> fit_weights(Predictions.from_probabilities([bad, good], [0, 1])).weights
        (0.0, 1.0)
    """
    return _fitted(predictions, _weigh)


def fit_temperature(predictions: Predictions, recipe: Recipe | None = None) -> Recipe:
    """Fit the temperature of what the members predict together: one number that mends over- and under-confidence.

    The members are pooled first, as `recipe` weighs them or equally, and their log-probabilities divided by T then.

    Args:
        predictions: of classes or labels, for held-out examples, with labels.
        recipe: whose weights to use; what it holds is kept but for the temperature.

    Raises:
        DataError: labels are missing, the split is test, the predictions are no probabilities, or no finite
            temperature is best: every label is the most probable class, or a label has probability 0, or outputs say
            nothing about the labels.

    Example:
        >>> unsure = Predictions.from_probabilities([[[0.6, 0.4]] * 9 + [[0.4, 0.6]]], [0] * 10)
        >>> round(fit_temperature(unsure).temperature, 3)
        0.185

    Source:
        Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017, section 4.2; pooled first:
        Rahaman, Thiery, Uncertainty quantification and deep ensembles, NeurIPS 2021.
    """
    if predictions.kind not in ("classes", "labels"):
        raise DataError(f"a temperature is for probabilities, got predictions of kind {predictions.kind!r}")
    base = Recipe((1.0,) * len(predictions)) if recipe is None else recipe
    base.check(predictions)
    return _fitted(predictions, lambda part: replace(base, temperature=_temper(part, base.weights)), base)


def _fitted(predictions: Predictions, fit: Callable[[Predictions], Recipe], base: Recipe | None = None) -> Recipe:
    """Fit on all rows, and measure what it gains: on these rows, or on those of the other half where there are few."""
    check_split(predictions, base)
    made = fit(predictions)
    plain = Recipe((1.0,) * len(predictions))
    if predictions.examples >= FEW:
        gain: float | None = _loss(predictions, plain) - _loss(predictions, made)
        how = "in-sample"
    else:
        how = "2-fold, 5 times"
        if base is None or base.fitted is None:
            gain = _cross_fitted_gain(predictions, fit, plain)
        elif base.fitted.gain is None or base.temperature != 1.0:  # what its weights alone gained is not known
            gain = None
        else:
            more = _cross_fitted_gain(predictions, fit, base)
            gain = None if more is None else base.fitted.gain + more
    gain = gain if gain is not None and np.isfinite(gain) else None
    fitted = Fitted(predictions.rows, predictions.split, gain, how)
    return replace(made, fitted=fitted, members=predictions.members or made.members)


def check_split(predictions: Predictions, base: Recipe | None) -> None:
    """Check that what is fitted on may be fitted on, and is what `base` was fitted on.

    Raises:
        DataError: it is the test data, or another split.
    """
    split = predictions.split
    if split == "test":
        raise DataError("nothing is fitted on test data, got predictions of split 'test': give those of held-out data")
    known = None if base is None or base.fitted is None else base.fitted.split
    if None not in (split, known) and split != known:
        raise DataError(f"the recipe was fitted on split {known!r}, got predictions of {split!r}: give the same")


def _cross_fitted_gain(predictions: Predictions, fit: Callable[[Predictions], Recipe], plain: Recipe) -> float | None:
    if predictions.examples < 4:
        return None
    random, gains, rows = np.random.default_rng(0), [], []
    for _ in range(5):
        order = random.permutation(predictions.examples)
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        for fitted_on, scored_on in (halves, halves[::-1]):
            try:
                one, other = predictions.take(fitted_on), predictions.take(scored_on)
                gains.append(_loss(other, plain) - _loss(other, fit(one)))
            except DataError:  # a half without a label that counts, or one that no finite temperature fits best
                return None
            rows.append(other.rows)
    return float(np.average(gains, weights=rows))


def _loss(predictions: Predictions, recipe: Recipe) -> float:
    if predictions.kind == "values":
        return score_predictions(predictions, weights=recipe.weights)["rmse"]
    if recipe.temperature == 1.0:
        return -float(pool("classes", _likelihoods(predictions), np.asarray(recipe.weights)).mean())
    table, known = _pooled_table(predictions, recipe.weights)
    return -float(_log_softmax_at(table, known, 1 / recipe.temperature).mean())


def _select(predictions: Predictions, size: int) -> Recipe:
    values = predictions.kind == "values"
    rows = _residuals(predictions) if values else _likelihoods(predictions)
    # What is summed up so far: residuals, or logarithms of likelihoods.
    total = np.zeros(rows.shape[1]) if values else np.full(rows.shape[1], -np.inf)
    picks: list[int] = []
    best, length = (np.inf, np.inf), 0
    for count in range(1, size + 1):
        lost = np.zeros(len(rows))
        if values:
            losses = (((total + rows) / count) ** 2).mean(axis=1)
        else:
            sums = (np.logaddexp(total, row) for row in rows)
            lost, losses = np.array([_lost_and_loss(each) for each in sums]).T
            losses += np.log(count)
        # While labels have probability 0 the loss is infinite whatever is chosen: fewer of them come first.
        losses[lost > lost.min()] = np.inf
        equal = np.flatnonzero(losses == losses.min())
        known = [index for index in equal if index in picks]
        pick = int(known[0] if known else equal[0])
        total = total + rows[pick] if values else np.logaddexp(total, rows[pick])
        picks.append(pick)
        if (lost[pick], losses[pick]) < best:
            best, length = (lost[pick], losses[pick]), count
    return Recipe(tuple(np.bincount(picks[:length], minlength=len(rows))))


def _lost_and_loss(logs: Floats) -> tuple[int, float]:
    """Return how many likelihoods are 0, and minus the mean logarithm of the others, over all rows."""
    finite = logs > -np.inf
    return int(len(logs) - np.count_nonzero(finite)), -float(logs.sum(where=finite)) / len(logs)


def _weigh(predictions: Predictions) -> Recipe:
    if predictions.kind == "values":
        residuals = _residuals(predictions)
        curvature = residuals @ residuals.T / residuals.shape[1]
        scale = max(float(np.trace(curvature)) / len(curvature), np.finfo(float).tiny)
        curvature /= scale  # so that the tolerance is a share of a member's error

        def squares(weights: Floats) -> tuple[float, Floats, Floats]:
            slope = curvature @ weights
            return float(weights @ slope), 2 * slope, 2 * curvature

        return Recipe(tuple(minimise(squares, len(predictions), tolerance=1e-6)[0]))
    rows = _likelihoods(predictions)
    shares = np.exp(rows - rows.max(axis=0))  # of each row's best member: ratios are all that counts

    def likelihood(weights: Floats) -> tuple[float, Floats, Floats]:
        pooled = weights @ shares
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = shares / pooled
            value = -float(np.log(pooled).mean())
        return value, -ratios.mean(axis=1), ratios @ ratios.T / ratios.shape[1]

    return Recipe(tuple(minimise(likelihood, len(predictions), tolerance=1e-6)[0]))


def _temper(predictions: Predictions, weights: npt.ArrayLike) -> float:
    return best_temperature(*_pooled_table(predictions, weights))


def _pooled_table(
    predictions: Predictions, weights: npt.ArrayLike
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
    """Return what members predict together, [rows, classes], and the labels that count."""
    logs = np.empty(predictions.shape[1:], np.float32)
    for rows, block in predictions.blocks():
        logs[rows] = pool(predictions.kind, block, np.asarray(weights, np.float64))
    labels = predictions.labels_of(slice(None))
    if predictions.kind == "labels":
        flat = logs.reshape(-1).astype(np.float64)
        table, known = np.stack([log1mexp(flat), flat], axis=1), labels.reshape(-1)
    else:
        table, known = logs.reshape(-1, logs.shape[-1]), labels.reshape(-1)
        if predictions.ignore is not None:
            table, known = table[known != predictions.ignore], known[known != predictions.ignore]
    return table, known


def best_temperature(logs: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], *, near: float = 1.0) -> float:
    """Return the temperature at which labels are most likely.

    The loss is convex in β = 1/T: Newton's steps, and halves of an interval that holds the root where one leaves it.

    Args:
        logs: log-probabilities, [rows, classes].
        labels: [rows].
        near: where to begin.

    Raises:
        RunsOffError: none is best.
    """
    own = logs[np.arange(len(labels)), labels].astype(np.float64)
    if not np.isfinite(own).all():
        row = int(np.flatnonzero(~np.isfinite(own))[0])
        raise RunsOffError(f"the label of row {row} has probability 0, which no temperature mends: check the labels")
    low, high = 1 / _HIGHEST, 1 / _LOWEST
    if _slope(logs, own, low)[0] >= 0:
        raise RunsOffError(
            "the temperature runs off to infinity, since the predictions say nothing about the labels: check the labels"
        )
    if (own >= logs.max(axis=1)).all():
        raise RunsOffError(
            "the temperature runs off to 0, since every held-out label is the most probable class: hold out more rows"
        )
    before, beta = np.inf, 1 / near
    while abs(beta - before) > 1e-10 * beta:  # the interval becomes smaller each time
        slope, curvature = _slope(logs, own, beta)
        low, high = (beta, high) if slope < 0 else (low, beta)
        ahead = beta - slope / curvature if curvature > 0 else np.nan
        before, beta = beta, ahead if low < ahead < high else (low * high) ** 0.5
    if beta * _LOWEST > 1 - 1e-6:
        raise RunsOffError("the temperature runs off to 0, since the labels are nearly separated: hold out more rows")
    return float(1 / beta)


def _slope(logs: npt.NDArray[np.floating], own: Floats, beta: float) -> tuple[float, float]:
    """Return the first and second derivative in β of the mean of ln sum e^(β l) − β l_own."""
    first = second = 0.0
    step = max(1, 2**16 // logs.shape[1])
    for start in range(0, len(logs), step):
        part = logs[start : start + step].astype(np.float64)
        top = part.max(axis=1, keepdims=True)
        part -= top
        np.maximum(part, _NEVER, out=part)
        shares = np.exp(beta * part)
        total = shares.sum(axis=1)
        shares *= part
        mean = shares.sum(axis=1) / total
        second += float((np.einsum("nc,nc->n", shares, part) / total - mean**2).sum())
        first += float(mean.sum() + top.sum())
    return (first - float(own.sum())) / len(logs), second / len(logs)


def _log_softmax_at(logs: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], beta: float) -> Floats:
    """Return the log-probability of each label once all logarithms are multiplied by β."""
    result, step = np.empty(len(labels)), max(1, 2**16 // logs.shape[1])
    for start in range(0, len(logs), step):
        part, rows = logs[start : start + step].astype(np.float64), slice(start, start + step)
        own = part[np.arange(len(part)), labels[rows]]
        top = part.max(axis=1)
        result[rows] = beta * (own - top) - np.log(np.exp(beta * (part - top[:, None])).sum(axis=1))
    return result


def _likelihoods(predictions: Predictions) -> Floats:
    rows = predictions.log_likelihood()
    lost = np.flatnonzero(rows.max(axis=0) == -np.inf)
    if lost.size:
        raise DataError(f"the label of row {lost[0]} has probability 0 under every member: check the labels")
    return rows


def _residuals(predictions: Predictions) -> Floats:
    targets = predictions.labels_of(slice(None))
    return np.asarray(predictions[:].astype(np.float64) - targets).reshape(len(predictions), -1)
