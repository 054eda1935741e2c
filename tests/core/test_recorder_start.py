"""What is known at the start is said at the start: what cannot be saved, what differs, who sets the rate."""

import logging
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from snapcore import CosineCycles, CycleWarning, DivergedError, StoreError
from snapcore.store import SnapshotStore, read_point

from .training import SIXTY, Copied, Loop, counts

# ------------------------------------------------------------------------------------------------ a rehearsal


class Odd(Loop):
    """A loop with one more tensor, among the weights or beside them."""

    def __init__(self, directory, odd, *, beside=False, **options):
        self.odd, self.beside = odd, beside
        super().__init__(directory, **options)

    def capture(self):
        return Copied({**self.weights} if self.beside else {**self.weights, "odd": self.odd})

    def dump(self):
        tensors = {f"weights/{name}": array for name, array in self.weights.items()}
        return Copied({**tensors, "odd" if self.beside else "weights/odd": self.odd}), {}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("odd", [np.array([1 + 2j], "complex128"), np.array(["a"]), np.array([object()])])
def test_what_no_file_can_hold_is_refused_before_the_first_update(tmp_path, odd, beside):
    with Odd(tmp_path, odd, beside=beside) as loop, pytest.raises(StoreError, match="odd"):
        loop.recorder.start()


def test_what_an_optimizer_makes_in_its_first_update_is_refused_right_after_it(tmp_path):
    with Odd(tmp_path, np.ones(3), beside=True) as loop:
        loop.recorder.start()
        loop.odd = np.array(["text"])
        with pytest.raises(StoreError, match="odd"):
            loop.step()
        loop.odd = np.ones(3)


@pytest.mark.parametrize("values", [{"a": object()}, {"a": float("nan")}])
def test_values_that_are_no_plain_json_are_refused_before_the_first_update(tmp_path, values, monkeypatch):
    with Loop(tmp_path) as loop:
        monkeypatch.setattr(loop, "dump", lambda: (Copied({"weights/updates": loop.weights["updates"]}), values))
        with pytest.raises(StoreError, match="plain JSON"):
            loop.recorder.start()
        monkeypatch.undo()


def test_a_disk_without_room_for_a_member_is_refused_before_the_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7))
    with Loop(tmp_path) as loop, pytest.raises(StoreError, match="has 7 bytes free, and a member needs 8"):
        loop.recorder.start()


@pytest.mark.parametrize("bound", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_from_the_start_and_never_moves_is_taken(tmp_path, bound):
    with Odd(tmp_path, np.array([1.0, bound])) as loop:
        loop.recorder.start()
        for _ in range(3):
            loop.step(20)
    assert [member.step for member in SnapshotStore(tmp_path).members] == [20, 40, 60]


@pytest.mark.parametrize("bound", [np.inf, -np.inf, np.nan])
def test_what_becomes_not_finite_while_training_is_refused(tmp_path, bound):
    loop = Odd(tmp_path, np.array([1.0, 2.0]))
    loop.recorder.start()
    loop.step(19)
    loop.odd = np.array([1.0, bound])
    loop.step()
    with pytest.raises(DivergedError, match="'odd'"):
        loop.recorder.close()


def test_a_bound_that_training_moves_is_refused(tmp_path):
    loop = Odd(tmp_path, np.array([1.0, np.inf]))
    loop.recorder.start()
    loop.odd = np.array([2.0, np.inf])
    loop.step(20)
    with pytest.raises(DivergedError, match="'odd'"):
        loop.recorder.close()


# ------------------------------------------------------------------------------------------------ where it is


def test_a_relative_directory_is_where_it_was_when_the_run_was_made(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    for each in (first, second):
        each.mkdir()
    monkeypatch.chdir(first)
    with Loop(Path("run"), resume_every=5) as loop:
        loop.step(10)
        os.chdir(second)
        loop.step(10)
        loop.step(7)
    assert list(second.iterdir()) == []
    assert read_point(first / "run").state["place"]["step"] == 27
    with Loop(first / "run") as again:
        again.recorder.start()
        os.chdir(first)
        assert again.updates == 27


# ------------------------------------------------------------------------------------------------ settings


def with_settings(directory, **settings):
    loop = Loop(directory)
    loop.given = settings
    return loop


def test_a_resumed_run_says_which_settings_differ(tmp_path, caplog):
    with with_settings(tmp_path, optimizer="SGD", momentum=0.9, decay=None) as loop:
        loop.step(5)
    caplog.clear()
    caplog.set_level(logging.INFO)
    with with_settings(tmp_path, optimizer="SGD", momentum=0.5, decay=None) as loop:
        loop.recorder.start()
    assert caplog.messages[:2] == [
        f"{tmp_path}: resumed after update 5 of 60",
        f"{tmp_path}: settings differ from those of the saved run: momentum 0.9 saved, 0.5 given, 0.5 in force",
    ]


def test_another_optimizer_is_refused_before_anything_is_touched(tmp_path):
    with with_settings(tmp_path, optimizer="SGD") as loop:
        loop.step(5)
    with (
        with_settings(tmp_path, optimizer="Adam") as loop,
        pytest.raises(StoreError, match="holds a run trained by SGD, got Adam: give that optimizer"),
    ):
        loop.recorder.start()
    assert loop.updates == 0


def test_settings_that_one_side_lacks_are_not_compared(tmp_path, caplog):
    with with_settings(tmp_path, momentum=0.9) as loop:
        loop.step(5)
    caplog.clear()
    with with_settings(tmp_path, nesterov=True) as loop:
        loop.recorder.start()
    assert not any("differ" in message for message in caplog.messages)


# ------------------------------------------------------------------------------------------------ the rate


def test_another_rate_is_warned_of_once_with_who_sets_it_and_recorded_with_the_member(tmp_path):
    with Loop(tmp_path) as loop:
        with pytest.warns(CycleWarning, match=r"update 19 .* rate 0\.05, .* 0\.00489.*: StepLR sets it") as caught:
            loop.step(19, used_lr=0.05, setter="StepLR")
        assert [one.filename for one in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loop.step(1, used_lr=0.05)
            loop.step(20)
    found = [member.lr for member in SnapshotStore(tmp_path).members]
    assert found == [0.05, SIXTY(39)]


def test_the_schedules_own_rate_is_recorded_to_the_last_bit_though_float32_was_used(tmp_path):
    with Loop(tmp_path) as loop, warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.step(20, used_lr=float(np.float32(SIXTY(19))))
    assert SnapshotStore(tmp_path).members[0].lr == SIXTY(19)


# ------------------------------------------------------------------------------------------------ members


def test_who_asks_is_called_with_each_member_as_it_is_taken(tmp_path):
    seen = []
    with Loop(tmp_path, on_member=lambda snapshot: seen.append((snapshot.index, loop.updates))) as loop:
        for _ in range(3):
            loop.step(20)
    assert seen == [(1, 20), (2, 40), (3, 60)]


def test_metrics_given_once_are_recorded_with_every_member(tmp_path):
    with Loop(tmp_path, metrics=lambda snapshot: {"index": snapshot.index}) as loop:
        loop.step(20)
        loop.step(20, metrics=lambda snapshot: {"other": 1.0})
        loop.step(5)
        loop.recorder.finish("enough")
    found = [member.metrics for member in SnapshotStore(tmp_path).members]
    assert found == [{"index": 1.0}, {"other": 1.0}, {"index": 3.0}]


def test_a_program_shorter_than_its_first_look_is_rehearsed_all_the_same(tmp_path):
    with Loop(tmp_path, CosineCycles(0.1, 2, 2)) as loop:
        loop.step()
        loop.step()
    assert counts(loop) == [(1, 1), (2, 2)]


def test_a_resume_point_is_written_when_it_is_asked_for_and_once(tmp_path):
    with Loop(tmp_path) as loop:
        loop.step(5)
        copies = loop.copies
        loop.recorder.save_point()
        loop.recorder.save_point()
        assert loop.copies == copies + 1
        loop.recorder.position()
        assert read_point(tmp_path).state["place"]["step"] == 5
        loop.step(15)
        loop.recorder.finish("enough")
        loop.recorder.save_point()
    assert read_point(tmp_path) is None
