"""What a person sees: lines, a bar, a table, and pictures."""

import io
import re

import pytest
from matplotlib.image import imread
from rich.console import Console

from snapcore import METHODS, CosineCycles, Snapshot, StoreError, program
from snapcore.lab.describe import describe_schedule
from snapcore.lab.display import Display
from snapcore.lab.plots import plot_schedule, plot_training


@pytest.fixture
def shown():
    return io.StringIO()


def display(shown, *, terminal=False, width=120):
    return Display(
        Console(file=shown, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, color_system=None)
    )


def test_a_line_is_printed_as_it_is_whatever_is_in_it(shown):
    display(shown, width=10).line("a long line with [brackets] and :smile: in it")
    assert shown.getvalue() == "a long line with [brackets] and :smile: in it\n"


def test_a_member_is_one_line_with_its_scores(shown):
    display(shown).member(Snapshot(3, 60, 60, 0.00123, 2), {"error": 4.5678, "nll": 0.123456})
    assert shown.getvalue() == "member 3   update     60   lr 1.23e-03   error  4.57 %   NLL 0.1235\n"


def test_the_table_has_a_row_for_every_ensemble(shown):
    rows = [{"m": m, "error": m / 3, "nll": m / 7, "brier": m / 11, "ece": m / 13} for m in (1, 2, 3)]
    display(shown).ensembles(rows)
    lines = [line.split() for line in shown.getvalue().splitlines()]
    assert lines[1] == ["m", "error", "NLL", "Brier", "ECE"]
    assert lines[2:] == [
        [f"{m}", f"{m / 3:.2f}", "%", f"{m / 7:.4f}", f"{m / 11:.4f}", f"{m / 13:.4f}"] for m in (1, 2, 3)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_the_bar_ends_at_the_last_update_in_the_last_cycle(method, shown):
    chosen = program(method, lr=0.1, steps=60, cycles=3)
    with display(shown, terminal=True).progress(chosen) as report:
        for step in range(1, chosen.updates + 1):
            report(step, 1 / step)
    frame = shown.getvalue().rpartition("cycle ")[2]
    cycle, cycles = re.match(r"(\d+)/(\d+) ", frame).groups()
    done, updates, lr, loss = re.search(r"(\d+)/(\d+) updates   lr (\S+)   loss (\S+)", frame).groups()
    assert cycle == cycles == str(len(chosen.schedule.cycle_starts))
    assert done == updates == str(chosen.updates)
    assert float(lr) == pytest.approx(chosen.schedule(chosen.updates - 1), abs=1e-4)
    assert float(loss) == pytest.approx(1 / chosen.updates, abs=1e-4)


def test_there_is_no_bar_where_nobody_watches(shown):
    with display(shown).progress(program("snapshot", lr=0.1, steps=60, cycles=3)) as report:
        report(60, 0.5)
    assert shown.getvalue().strip() == ""


@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_is_described_by_the_rates_it_gives(method):
    schedule = program(method, lr=0.1, steps=60, cycles=3).schedule
    rows = [[float(cell) for cell in line.split()] for line in list(describe_schedule(schedule))[2:]]
    starts = [0, *schedule.snapshot_steps[:-1]]
    assert [row[0] for row in rows] == list(range(1, len(starts) + 1))
    for row, start, stop in zip(rows, starts, schedule.snapshot_steps, strict=True):
        assert row[1:] == pytest.approx([start, stop, schedule(start), schedule(stop - 1)], rel=1e-3)


@pytest.mark.parametrize("updates", [1, 2, 199, 5000])
def test_a_training_of_any_length_is_drawn(updates, tmp_path):
    schedule = CosineCycles(lr=0.1, steps=updates, cycles=1)
    rows = [(step, schedule(step - 1), 1 / step) for step in range(1, updates + 1)]
    plot_training(rows, schedule, tmp_path / "a.png")
    height, width, _ = imread(tmp_path / "a.png").shape
    assert (width, height) == (9 * 120, 5 * 120)


@pytest.mark.parametrize("steps", [1, 100000])
def test_a_schedule_of_any_length_is_drawn(steps, tmp_path):
    plot_schedule(CosineCycles(lr=0.1, steps=steps, cycles=1), tmp_path / "a.png")
    height, width, _ = imread(tmp_path / "a.png").shape
    assert (width, height) == (9 * 120, 3 * 120)


def test_a_picture_that_cannot_be_written_is_refused_with_its_path(tmp_path):
    with pytest.raises(StoreError, match=r"gone/a\.png cannot be written: .*; choose another file"):
        plot_schedule(CosineCycles(lr=0.1, steps=9, cycles=1), tmp_path / "gone" / "a.png")
