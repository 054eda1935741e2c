"""What a comparison's cells say together: scores by seed, intervals, and one sentence."""

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from snapcore.errors import DataError
from snapcore.lab.cells import COSTLY, Cell
from snapcore.lab.scores import SHOWN
from snapcore.verdict import FEWEST, Comparison, compare_paired, ensemble_equivalent, in_words

Results = Mapping[Cell, Mapping[str, Any]]

TITLES = {"calibrated_nll": "NLL at T", **{name: title for name, title in SHOWN.items() if name != "error"}}
CALIBRATED = "calibrated_nll"
_WORDS = {CALIBRATED: "calibrated NLL", "nll": "NLL", "rmse": "RMSE"}
_PAIRED = (CALIBRATED, "nll", "rmse", "crps", "error", "brier", "ece")
"""Scores of an ensemble that are compared, the one that decides first."""


def summary(
    results: Results, failed: Mapping[Cell, str], *, methods: Sequence[str] = (), least: float = 0.0
) -> dict[str, Any]:
    """Return what `comparison.json` holds.

    Arguments:
        results: of the cells that are done, as `results.json` has them.
        failed: what the others failed of.
        methods: in the order in which they were asked for; others come after them.
        least: the gain, in the deciding score, under which a method is not worth it.

    Raises:
        DataError: methods of unequal budgets, or nothing to compare.
    """
    there = dict.fromkeys(cell.method for cell in [*results, *failed])
    methods = list(dict.fromkeys([*(method for method in methods if method in there), *there]))
    if not results:
        raise DataError(f"no cell is trained: {'; '.join(dict.fromkeys(failed.values()))}")
    _refuse_unequal(results)
    seeds = sorted({cell.seed for cell in [*results, *failed]})
    scores = [name for name in _PAIRED if any(name in each["ensemble"][-1] for each in results.values())]
    table = {method: _rows(method, seeds, results, scores) for method in methods}
    pairs = [_paired(a, b, score, table) for score in scores for a, b in itertools.combinations(methods, 2)]
    return {
        "seeds": seeds,
        "methods": table,
        "equivalent": _equivalents(methods, seeds, results, scores),
        "failed": {cell.name: message for cell, message in failed.items()},
        "pairs": pairs,
        "verdict": _verdict(methods, scores[0], table, least),
    }


def _refuse_unequal(results: Results) -> None:
    updates: dict[int, list[str]] = {}
    for cell, found in results.items():
        if cell.method != COSTLY:
            updates.setdefault(found["updates"], []).append(cell.name)
    if len(updates) > 1:
        said = "; ".join(f"{', '.join(names)}: {count:,}" for count, names in sorted(updates.items()))
        raise DataError(f"methods are compared at equal budgets, got updates of {said}: leave those that differ out")


def _rows(method: str, seeds: Sequence[int], results: Results, scores: Sequence[str]) -> dict[str, list[Any]]:
    """Return a method's scores by seed; None where its cell has failed, or has no such score."""
    found = [results.get(Cell(method, seed)) for seed in seeds]
    rows: dict[str, list[Any]] = {
        "updates": [None if each is None else each["updates"] for each in found],
        "members": [None if each is None else len(each["ensemble"]) for each in found],
    }
    for score in scores:
        rows[score] = [None if each is None else _of(each["ensemble"][-1], score) for each in found]
    return rows


def _of(row: Mapping[str, float], score: str) -> float | None:
    """Return a score of an ensemble, None if it is not finite; where no temperature was worth fitting it is 1."""
    value = row.get(score, row.get("nll") if score == CALIBRATED else None)
    return value if value is not None and math.isfinite(value) else None


def compared(a: str, b: str, score: str, table: Mapping[str, Mapping[str, Sequence[Any]]]) -> Comparison | None:
    """Compare two methods on the seeds that both have; None with fewer than two."""
    both = [
        (mine, other) for mine, other in zip(table[a][score], table[b][score], strict=True) if None not in (mine, other)
    ]
    return compare_paired(*zip(*both, strict=True)) if len(both) > 1 else None


def _paired(a: str, b: str, score: str, table: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, Any]:
    found = compared(a, b, score, table)
    row: dict[str, Any] = {"a": a, "b": b, "score": score}
    if found is None:
        return {**row, "pairs": 0, "difference": None, "low": None, "high": None, "p": None, "verdict": None}
    return {
        **row,
        "pairs": found.pairs,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "verdict": found.verdict,
    }


def _all_of(values: Sequence[float | None]) -> list[float]:
    """Return values without a gap; none of them if there is one."""
    there = [value for value in values if value is not None]
    return there if len(there) == len(values) else []


def _equivalents(
    methods: Sequence[str], seeds: Sequence[int], results: Results, scores: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Return how many independent networks each method is worth, on the seeds of both; None for more than all."""
    found: dict[str, dict[str, float | None]] = {}
    for score in [name for name in (CALIBRATED, "nll", "rmse") if name in scores]:
        for method in [method for method in methods if method != COSTLY]:
            both = [seed for seed in seeds if Cell(COSTLY, seed) in results and Cell(method, seed) in results]
            curves = [results[Cell(COSTLY, seed)]["ensemble"] for seed in both]
            by_size = [_all_of([_of(row, score) for row in rows]) for rows in zip(*curves, strict=False)]
            own = _all_of([_of(results[Cell(method, seed)]["ensemble"][-1], score) for seed in both])
            if own and by_size and all(by_size):
                worth = ensemble_equivalent(fmean(own), [fmean(rows) for rows in by_size])
                found.setdefault(method, {})[score] = worth if math.isfinite(worth) else None
    return found


def _verdict(methods: Sequence[str], score: str, table: Mapping[str, Mapping[str, Sequence[Any]]], least: float) -> str:
    """Return the sentence on the first method that is asked about, beside one cosine run or else the last one."""
    known = [method for method in methods if method != COSTLY]
    baseline = "cosine" if "cosine" in known else known[-1] if known else ""
    asked = next((method for method in known if method != baseline), None)
    if asked is None:
        return "Not decided: there is one method; add others at the same budget."
    found = compared(asked, baseline, score, table)
    if found is None:
        return f"Not decided: {asked} and {baseline} share fewer than two seeds; train {FEWEST}."
    return in_words(
        found, asked, baseline, score=_WORDS.get(score, score), unit="nats" if "nll" in score else "", least=least
    )
