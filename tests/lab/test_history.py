"""The table of losses: complete after any kill, and cheap to bring up to date."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import CosineCycles, StoreError
from snapcore.lab.history import History

RATE = CosineCycles(lr=0.2, steps=60, cycles=3)


def loss_of(step):
    return 1 / (step + 1) ** 7  # many digits, and exponents, to be cut in two


def fill(history, start, stop, write_at=()):
    for step in range(start, stop + 1):
        history.report(step, loss_of(step))
        if step in write_at:
            history.write()
    history.write()


def expected(stop):
    return [(step, RATE(step - 1), loss_of(step)) for step in range(1, stop + 1)]


def table(directory):
    with (directory / "history.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "lr", "loss"]
    return [(int(step), float(lr), float(loss)) for step, lr, loss in rows]


@given(write_at=st.sets(st.integers(1, 60)))
@settings(max_examples=20, deadline=None)
def test_the_table_has_every_update_once_however_often_it_is_written(write_at, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    fill(History(directory, RATE), 1, 60, write_at)
    assert table(directory) == expected(60)
    assert [path.name for path in directory.iterdir()] == ["history.csv"]


@given(data=st.data(), stop=st.integers(1, 60), writes=st.sets(st.integers(1, 60)))
@settings(max_examples=30, deadline=None)
def test_a_run_killed_while_it_writes_ends_with_the_same_bytes(data, stop, writes, tmp_path_factory):
    directory, whole = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("whole")
    fill(History(whole, RATE), 1, 60)
    fill(History(directory, RATE), 1, stop, writes)
    content = (directory / "history.csv").read_bytes()
    point = data.draw(st.integers(0, stop), label="the resume point")
    least = [0, *(at + 1 for at, byte in enumerate(content) if byte == ord("\n"))][point + 1]
    cut = data.draw(st.integers(least, len(content)), label="bytes that reached the disk")
    (directory / "history.csv").write_bytes(content[:cut])
    history = History(directory, RATE)
    assert history.rows == expected(len(history.rows))
    assert len(history.rows) >= point
    fill(history, point + 1, 60, writes)
    assert (directory / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()


def test_a_loss_cut_off_in_its_exponent_is_not_read(tmp_path):
    (tmp_path / "history.csv").write_text("step,lr,loss\r\n1,0.2,0.5\r\n2,0.2,5.3e-")
    assert History(tmp_path, RATE).rows == [(1, 0.2, 0.5)]


@pytest.mark.parametrize(
    "row",
    [
        "one,0.2,0.5",
        "1,0.2",
        "1,0.2,0.5,9",
        "1,0.3,0.5",
        "1,0.2,nan",
        "1,0.2,inf",
        "0,0.2,0.5",
        "",
        "1,0.2,0.5\r\n3,0.2,0.5",
    ],
)
def test_a_table_that_was_edited_is_refused_with_the_cure(row, tmp_path):
    (tmp_path / "history.csv").write_text(f"step,lr,loss\r\n{row}\r\n")
    with pytest.raises(StoreError, match=r"history\.csv is damaged: .*; delete it"):
        History(tmp_path, RATE)


@pytest.mark.parametrize("content", ["", "loss\r\n", "step,loss,lr\r\n", "step,lr,loss,more\r\n"])
def test_a_table_of_something_else_is_refused_by_its_header(content, tmp_path):
    (tmp_path / "history.csv").write_text(content)
    with pytest.raises(StoreError, match=r"history\.csv is damaged: it does not begin with step,lr,loss"):
        History(tmp_path, RATE)


def test_a_new_run_does_not_read_the_table_of_another(tmp_path):
    (tmp_path / "history.csv").write_text("step,lr,loss\r\n1,0.3,0.5\r\n")
    history = History(tmp_path, RATE, resumed=False)
    fill(history, 1, 3)
    assert table(tmp_path) == expected(3)


def test_a_rate_that_another_machine_rounds_otherwise_is_still_this_runs(tmp_path):
    (tmp_path / "history.csv").write_text(f"step,lr,loss\r\n1,{0.2 * (1 + 1e-15)!r},0.5\r\n")
    assert len(History(tmp_path, RATE).rows) == 1


def test_the_table_is_whole_when_it_is_written_anew_after_a_write_was_cut_short(tmp_path):
    history = History(tmp_path, RATE)
    fill(history, 1, 10)
    with (tmp_path / "history.csv").open("a") as file:
        file.write("11,0.")
    history.report(11, loss_of(11))
    history.write(anew=True)
    fill(history, 12, 20)
    assert table(tmp_path) == expected(20)


@pytest.mark.parametrize("tail", [b"3," + b"0" * 200, b"\0" * 10**6, b"\0" * 99 + b"\xff"])
def test_a_table_whose_last_line_no_kill_has_cut_off_is_refused(tail, tmp_path):
    history = History(tmp_path, RATE)
    fill(history, 1, 2)
    with (tmp_path / "history.csv").open("ab") as file:
        file.write(tail)
    with pytest.raises(StoreError, match=r"history\.csv is damaged"):
        History(tmp_path, RATE)


def test_nothing_is_written_before_it_is_asked_for(tmp_path):
    History(tmp_path, RATE).report(1, 0.5)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said_with_its_path(tmp_path):
    history = History(tmp_path / "gone", RATE)
    with pytest.raises(StoreError, match=r"gone/history\.csv cannot be written: .*; make room"):
        history.write()
