"""Pictures: a run's rate and loss, a schedule, how much members differ."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snapcore.errors import StoreError
from snapcore.lab.ours import MAKER, PICTURES, is_ours
from snapcore.schedule import Schedule
from snapcore.store import atomic_write

_POINTS = 2000
_LEGIBLE = 12  # members whose correlations fit as numbers into a picture


def plot_training(rows: Sequence[tuple[int, float, float]], schedule: Schedule, path: Path) -> None:
    """Draw the rate and the loss of every update, with a line where each member was taken.

    Arguments:
        rows: (step, rate, loss) of each update.
        schedule: says when members were due.
        path: of the picture; its suffix is the format.
    """
    steps, rates, losses = (np.array(column, float) for column in zip(*rows, strict=True))
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    above.plot(steps, rates, color="tab:blue")
    above.set_ylabel("learning rate")
    window = max(len(losses) // 200, 1)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    below.plot(steps, losses, color="tab:red", alpha=0.2, linewidth=0.5)
    below.plot(steps[window - 1 :], smooth, color="tab:red")
    below.set(ylabel="training loss", xlabel="updates", yscale="log")
    for axes in (above, below):
        _mark_members(axes, schedule)
    _save(figure, path)


def plot_schedule(schedule: Schedule, path: Path) -> None:
    """Draw a schedule over its updates, with a numbered line where each snapshot is due."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    steps = np.unique(np.linspace(0, schedule.steps - 1, min(schedule.steps, _POINTS)).astype(int))
    axes.plot(steps, [schedule(int(step)) for step in steps], color="tab:blue")
    axes.set(xlabel="updates", ylabel="learning rate")
    _mark_members(axes, schedule)
    for number, step in enumerate(schedule.snapshot_steps, 1):
        axes.annotate(f"{number}", (step, schedule.lr), ha="right", va="top")
    _save(figure, path)


def plot_diversity(results: Mapping[str, Any], path: Path) -> None:
    """Draw figures 6 and 5 of the paper: the members' correlation, and the error on the lines between them.

    Arguments:
        results: from `measure_diversity`.
        path: of the picture; its suffix is the format.
    """
    members, walked = results["members"], results["interpolation"]
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    matrix, neighbours, to_last = figure.subplots(1, 3)
    _draw_matrix(matrix, np.array(results["correlation"]), members)
    to_last.sharey(neighbours)
    for line in walked["lines"]:
        one, other = line["members"]
        if members.index(other) == members.index(one) + 1:
            neighbours.plot(walked["shares"], line["error"], label=f"{one} to {other}")
        if other == members[-1]:
            to_last.plot(walked["shares"], line["error"], label=f"{one} to {other}")
    statistics = "re-estimated" if walked["refreshed_on"] else "averaged"
    for axes, title in ((neighbours, "neighbours"), (to_last, "each member and the last")):
        axes.set(title=title, xlabel=f"share of the second member; batch statistics {statistics}")
        axes.set_ylabel("test error in percent")
        axes.set_ylim(bottom=0)
        axes.legend()
    _save(figure, path)


def _draw_matrix(axes: Axes, values: np.ndarray[Any, Any], members: Sequence[int]) -> None:
    axes.imshow(values, cmap="viridis", vmin=min(0.7, values.min()), vmax=1.0)
    axes.set(title="correlation of softmax outputs", xlabel="member", ylabel="member")
    for ticks in (axes.set_xticks, axes.set_yticks):
        ticks(range(len(members)), [str(member) for member in members])
    if len(members) <= _LEGIBLE:
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.9 else "black")


def _mark_members(axes: Axes, schedule: Schedule) -> None:
    for step in schedule.snapshot_steps:
        axes.axvline(step, color="grey", linestyle="--", linewidth=0.8)


def _save(figure: Figure, path: Path) -> None:
    suffix = path.suffix or ".png"
    field, _ = PICTURES.get(suffix, (None, None))
    if os.path.lexists(path) and not is_ours(path):
        raise StoreError(f"{path} cannot be written: what is there is not snapcore's; choose another file")
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=120, metadata={field: MAKER} if field else None)
    except (OSError, ValueError) as error:  # the latter: no such format
        raise StoreError(f"{path} cannot be written: {error}; choose another file") from error
