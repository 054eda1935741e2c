"""The table of losses after a kill in the middle of writing it."""

import itertools
import os

import pytest

from snapcore.errors import StoreError
from snapcore.lab.history import History


def rate(step):
    return 0.1 / (step + 1)


def reported(history, start, stop):
    for step in range(start + 1, stop + 1):
        history.report(step, 2.0 / step)
    return history


@pytest.fixture
def undisturbed(tmp_path):
    (tmp_path / "undisturbed").mkdir()
    reported(History(tmp_path / "undisturbed", rate), 0, 30).write()
    return (tmp_path / "undisturbed" / "history.csv").read_bytes()


def test_a_table_cut_off_anywhere_after_the_resume_point_ends_as_the_undisturbed_one(
    tmp_path, undisturbed, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # as slow as the disk, and not what is tested
    path = tmp_path / "history.csv"
    at_point = len(b"".join(itertools.islice(undisturbed.splitlines(keepends=True), 11)))  # the header and 10 updates
    for length in range(at_point, len(undisturbed) + 1):
        path.write_bytes(undisturbed[:length])
        history = reported(History(tmp_path, rate), 10, 17)
        history.write()
        reported(history, 17, 30).write()
        assert path.read_bytes() == undisturbed


def test_a_table_that_is_none_is_refused_by_name(tmp_path):
    for text in (b"step,lr,loss\r\n1,0.1,much\r\n", b"step,lr,loss\r\n1,0.1\r\n", b"step,lr,loss\r\n\xff,1,1\r\n"):
        (tmp_path / "history.csv").write_bytes(text)
        with pytest.raises(StoreError, match=r"history\.csv is damaged.*delete it"):
            History(tmp_path, rate)
