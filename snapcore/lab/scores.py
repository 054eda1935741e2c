"""How scores are shown: what each is called, and to how many digits."""

from collections.abc import Mapping

SHOWN = {
    "error": "error",
    "rmse": "RMSE",
    "nll": "NLL",
    "perplexity": "perplexity",
    "crps": "CRPS",
    "brier": "Brier",
    "ece": "ECE",
}
"""Scores of all kinds of task, in the order of a table's columns, and their titles."""

_LINE = ("error", "rmse", "nll", "crps")


def cell(name: str, value: float) -> str:
    """Return a score as a table shows it.

    Example:
        >>> cell("error", 4.567), cell("nll", 0.123456)
        ('4.57 %', '0.1235')
    """
    return f"{value:.2f} %" if name == "error" else f"{value:.4f}"


def in_line(scores: Mapping[str, float]) -> list[str]:
    """Return the scores that matter most, each with its title.

    Example:
        >>> in_line({"error": 4.567, "nll": 0.123456, "ece": 0.1})
        ['error  4.57 %', 'NLL 0.1235']
    """
    return [
        f"{SHOWN[name]} {cell(name, scores[name]):>{7 if name == 'error' else 0}}" for name in _LINE if name in scores
    ]
