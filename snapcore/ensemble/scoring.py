"""How good ensembles are: that of the last 1, 2, … M members, or one with weights and a temperature."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from snapcore.ensemble.combine import LogMean, Mean, MemberSequence, check_last, check_weights, fetchable, pool
from snapcore.ensemble.predictions import Floats, Predictions, likelihood, log1mexp
from snapcore.errors import DataError
from snapcore.metrics import RowScores, crps, row_scores, score, summary


def prefix_curve(
    probabilities: MemberSequence | Iterable[npt.ArrayLike], labels: npt.ArrayLike | None = None, *, log: bool = False
) -> list[dict[str, float]]:
    """Score the ensembles of the last 1, 2, … M members, in one pass over the members.

    Row m is `score(combine(probabilities, last=m), labels)`, but each member is fetched exactly once,
    from the last to the first, so all M ensembles cost M forward passes.

    Args:
        probabilities: [members, examples, classes], or a sequence of members [examples, classes], or an
            iterable of them; each value finite and in 0..1. A sequence may load its members on demand: one
            at a time is held. An iterable is first read into a list, since its last member comes last.
            `Predictions` are read a block of examples at a time.
        labels: [examples], integers in 0..classes−1. `Predictions` have their own.
        log: whether the members are log-probabilities.

    Returns:
        M rows `{"m", "error", "nll", "brier", "ece"}`, m = 1 … M; error in percent, nll in nats per example. Of
        `Predictions` the rows are what `score_predictions` gives for their kind.

    Raises:
        DataError: no members, members of different shapes, values that are no probabilities, labels that
            do not fit.

    Example:
        >>> rows = prefix_curve([[[0.8, 0.2], [0.9, 0.1]], [[0.6, 0.4], [0.3, 0.7]]], [0, 1])
        >>> [(row["m"], row["error"]) for row in rows]
        [(1, 0.0), (2, 50.0)]

    Source:
        Huang, Li, Pleiss, Liu, Hopcroft, Weinberger, Snapshot Ensembles: Train 1, Get M for Free,
        ICLR 2017, section 3; the curve over m is what its section 4 plots.
    """
    if isinstance(probabilities, Predictions):
        if labels is not None:
            raise DataError("labels must be left out: predictions have their own")
        return _curve(probabilities)
    if labels is None:
        raise DataError("labels are missing: pass [examples] class numbers")
    members = fetchable(probabilities, None)
    mean, rows = LogMean("prefix_curve") if log else Mean("prefix_curve"), []
    for m in range(1, check_last(len(members), None) + 1):
        mean.add(members[len(members) - m], -m)
        rows.append({"m": m, **score(mean.value(), labels, log=log)})
    return rows


def score_predictions(
    predictions: Predictions, *, weights: npt.ArrayLike | None = None, temperature: float = 1.0
) -> dict[str, float]:
    """Score one ensemble of members, on the predictions' own labels.

    Args:
        predictions: with labels.
        weights: one number per member, not negative; equal by default.
        temperature: what the pooled log-probabilities of classes or labels are divided by; see `fit_temperature`.

    Returns:
        For classes and labels `{"error", "nll", "brier", "ece"}`, a row being one label (nats per label); for values
        `{"rmse"}`; for gaussian members `{"rmse", "nll", "crps"}`, of the mixture itself.

    Raises:
        DataError: labels are missing, weights do not fit, or values have a temperature.
    """
    shares = check_weights(weights, len(predictions))
    _check_temperature(predictions.kind, temperature)
    if predictions.kind in ("values", "gaussian"):
        return _score_values(predictions, shares)
    parts = []
    for rows, block in predictions.blocks():
        pooled = tempered(predictions.kind, pool(predictions.kind, block, shares), temperature)
        parts.append(_rows(predictions, pooled, rows))
    return summary(_joined(parts))


def tempered(kind: str, pooled: Floats, temperature: float) -> Floats:
    """Return log-probabilities at a temperature: ln softmax(l / T) for classes, ln sigmoid(logit / T) for labels.

    Raises:
        DataError: the temperature is not above 0, or the kind has none.
    """
    _check_temperature(kind, temperature)
    if temperature == 1.0:
        return pooled
    if kind == "classes":
        scaled = pooled / temperature
        top = scaled.max(axis=-1, keepdims=True)
        return np.asarray(scaled - top - np.log(np.exp(scaled - top).sum(axis=-1, keepdims=True)))
    with np.errstate(invalid="ignore"):
        logit = pooled - log1mexp(pooled)
    return np.asarray(-np.logaddexp(0.0, -logit / temperature))


def _check_temperature(kind: str, temperature: float) -> None:
    if temperature != 1.0 and kind not in ("classes", "labels"):
        raise DataError(f"temperature is for probabilities, got predictions of kind {kind!r}; leave it out")
    if not 0 < temperature < np.inf:
        raise DataError(f"temperature must be above 0 and finite, got {temperature}")


def _curve(predictions: Predictions) -> list[dict[str, float]]:
    n_members = len(predictions)
    if predictions.kind in ("values", "gaussian"):
        return [
            {"m": m, **_score_values(predictions, (np.arange(n_members) >= n_members - m).astype(np.float64))}
            for m in range(1, n_members + 1)
        ]
    parts: list[list[RowScores]] = [[] for _ in range(n_members)]
    for rows, block in predictions.blocks():
        mean = LogMean("prefix_curve")
        for m in range(1, n_members + 1):
            mean.add(block[-m], -m)
            parts[m - 1].append(_rows(predictions, mean.value(), rows))
    return [{"m": m, **summary(_joined(found))} for m, found in enumerate(parts, start=1)]


def _rows(predictions: Predictions, pooled: Floats, rows: slice) -> RowScores:
    """Return the scores of a block's labels that count."""
    labels = predictions.labels_of(rows)
    if predictions.kind == "labels":  # each label is a choice between two classes
        return row_scores(np.stack([log1mexp(pooled).ravel(), pooled.ravel()], 1), labels.ravel(), log=True)
    counts = np.ones(labels.shape, bool) if predictions.ignore is None else labels != predictions.ignore
    if not counts.any():
        return RowScores(*(np.empty(0) for _ in RowScores._fields))
    return row_scores(pooled[counts], labels[counts], log=True)


def _score_values(predictions: Predictions, shares: Floats) -> dict[str, float]:
    kind, used = predictions.kind, np.flatnonzero(shares)
    squares = logs = ranked = 0.0
    for rows, all_members in predictions.blocks():
        targets, block = predictions.labels_of(rows), all_members[used]
        pooled = pool(kind, block, shares[used])
        means = pooled if kind == "values" else pooled[..., 0]
        squares += float(np.sum((means - targets) ** 2))
        if kind == "gaussian":
            logs += float(pool("labels", likelihood(kind, block, targets, None), shares[used]).sum())  # of the mixture
            ranked += targets.size * crps(block[..., 0], block[..., 1], targets, weights=shares[used])
    count = predictions.rows
    found = {"rmse": float(np.sqrt(squares / count))}
    return found if kind == "values" else {**found, "nll": -logs / count, "crps": ranked / count}


def _joined(parts: list[RowScores]) -> RowScores:
    return RowScores(*map(np.concatenate, zip(*parts, strict=True)))
