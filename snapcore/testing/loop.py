"""The rules that hold besides for a run in a loop that one writes oneself, as tests to inherit.

A third party inherits `LoopConformance`, says how its framework makes, updates and reads a model, and pytest does the
rest; docs/new-backend.md shows a whole one.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from snapcore.errors import CycleWarning, ProtocolError
from snapcore.protocol import Program
from snapcore.schedule import Schedule
from snapcore.store import SnapshotStore
from snapcore.testing.arrays import Arrays, assert_equal, frozen
from snapcore.testing.run import RunConformance
from snapcore.testing.trainings import CYCLES, Stopped, X, point_at, steps


class LoopConformance(RunConformance):
    """`RunConformance` for a `SnapshotRun`: the loop is written here, around three verbs more."""

    def open(self, directory: Path, cycles: Schedule | Program, subject: Any, **options: Any) -> Any:
        """Return a run of the subject, which is where the run resumes."""
        raise NotImplementedError

    def update(self, subject: Any, x: NDArray[np.float32]) -> None:
        """Do one update of the subject; the run does not hear of it."""
        raise NotImplementedError

    def step(self, run: Any, subject: Any) -> None:  # noqa: ARG002
        """Have the run record what was done since; override it where the run hands back other weights."""
        run.step()

    def train(
        self,
        directory: Path,
        cycles: Schedule | Program,
        subject: Any,
        *,
        before: Callable[[], None],
        after: Callable[[], bool],
        **options: Any,
    ) -> None:
        """Train under a run: the loop that one writes oneself."""
        with self.open(directory, cycles, subject, **options) as run:
            for x in run.batches([X] * 5):
                before()
                self.update(subject, x)
                leaving = after()
                self.step(run, subject)
                if leaving:
                    break

    def test_rule_25_a_run_says_how_far_it_is(self, tmp_path: Path) -> None:
        """Rule 25: `updates` and `finished`, after every update."""
        subject = self.new(0, CYCLES)
        with self.open(tmp_path / "run", CYCLES, subject) as run:
            found = [(run.updates, run.finished)]
            for _ in range(CYCLES.steps):
                self._update(run, subject)
                found.append((run.updates, run.finished))
        assert found == [(step, step == CYCLES.steps) for step in range(CYCLES.steps + 1)]

    def test_rule_26_an_update_after_the_end_is_refused(self, tmp_path: Path) -> None:
        """Rule 26: and the run is as it was."""
        subject = self.new(0, CYCLES)
        with self.open(tmp_path / "run", CYCLES, subject) as run:
            self._update(run, subject, CYCLES.steps)
            with pytest.raises(ProtocolError, match="stopped after 13 updates"):
                self._update(run, subject)
        assert steps(tmp_path / "run") == self._undisturbed().steps

    def test_rule_27_batches_come_epoch_after_epoch(self, tmp_path: Path) -> None:
        """Rule 27: and an epoch in which no update is recorded is an error, not an endless loop."""
        batches = self._batches(tmp_path / "run", range(5))
        assert batches == [index % 5 for index in range(len(batches))]
        subject = self.new(0, CYCLES)
        with (
            self.open(tmp_path / "other", CYCLES, subject) as run,
            pytest.raises(ProtocolError, match="no update in 5 batches"),
        ):
            list(run.batches(range(5)))

    def test_rule_28_after_a_resume_the_same_batches_come_in_the_same_order(self, tmp_path: Path) -> None:
        """Rule 28: those of an epoch whose order was drawn; one that was taken, and left unused, comes again."""
        whole = self._batches(tmp_path / "whole", _Shuffled())
        begun = self._batches(tmp_path / "run", _Shuffled(), leave_after=8)
        assert begun + self._batches(tmp_path / "run", _Shuffled(), seed=1) == whole

    def test_rule_29_an_exception_leaves_the_resume_point_of_before(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Rule 29: it may have come in the middle of an update. The log says how far the loop was."""
        subject = self.new(0, CYCLES)
        with suppress(Stopped), self.open(tmp_path / "run", CYCLES, subject) as run:
            self._update(run, subject, 8)
            raise Stopped
        assert point_at(tmp_path / "run") == 6
        assert "8 of 13 updates" in caplog.text

    def test_rule_30_a_late_member_is_warned_of_and_recorded_with_the_true_step(self, tmp_path: Path) -> None:
        """Rule 30: where several updates were done between two calls of `step`."""
        subject = self.new(0, CYCLES)
        with self.open(tmp_path / "run", CYCLES, subject) as run:
            for _ in range(8):
                self.update(subject, X)
            with pytest.warns(CycleWarning, match="due after update 6 and is taken 2 updates late"):
                self.step(run, subject)
            assert run.updates == 8
        (member,) = SnapshotStore(tmp_path / "run").members
        assert (member.step, member.due, member.lr) == (8, 6, CYCLES(7))

    def test_rule_31_finish_takes_an_unfinished_member_if_there_is_something_to_take(self, tmp_path: Path) -> None:
        """Rule 31: not right after a member."""
        for updates, expected in ((8, [(6, False), (8, True)]), (6, [(6, False)])):
            directory, subject = tmp_path / str(updates), self.new(0, CYCLES)
            with self.open(directory, CYCLES, subject) as run:
                self._update(run, subject, updates)
                run.finish("out of time")
                assert run.finished
            store = SnapshotStore(directory)
            assert store.stopped == "out of time"
            assert [(member.step, member.unfinished) for member in store.members] == expected
            assert_equal(store.load(len(expected)), self._weights(subject))

    def test_rule_32_an_ensemble_leaves_unfinished_members_out(self, tmp_path: Path) -> None:
        """Rule 32."""
        subject = self.new(0, CYCLES)
        with self.open(tmp_path / "run", CYCLES, subject) as run:
            self._update(run, subject, 8)
            run.finish("out of time")
        assert len(self.ensemble(tmp_path / "run", X)[1]) == 1

    def test_rule_33_a_run_without_updates_writes_nothing_to_resume(self, tmp_path: Path) -> None:
        """Rule 33: it begins where it would have begun."""
        for _ in range(2):
            with self.open(tmp_path / "run", CYCLES, self.new(0, CYCLES)) as run:
                assert run.updates == 0
        assert (steps(tmp_path / "run"), point_at(tmp_path / "run")) == ([], None)

    def test_rule_34_updates_after_a_run_was_closed_are_not_its_own(self, tmp_path: Path) -> None:
        """Rule 34: and closing it again does nothing."""
        subject = self.new(0, CYCLES)
        with self.open(tmp_path / "run", CYCLES, subject) as run:
            self._update(run, subject, 8)
        self.update(subject, X)
        run.close()
        assert (run.updates, run.finished) == (8, False)
        assert point_at(tmp_path / "run") == 8

    def _update(self, run: Any, subject: Any, times: int = 1) -> None:
        for _ in range(times):
            self.update(subject, X)
            self.step(run, subject)

    def _weights(self, subject: Any) -> Arrays:
        return frozen(self.weights(subject))

    def _batches(self, directory: Path, loader: Any, *, seed: int = 0, leave_after: int | None = None) -> list[Any]:
        """Return the batches that updates were made of, in a process that draws from that seed."""
        np.random.seed(seed)
        subject, used = self.new(seed, CYCLES), list[Any]()
        with self.open(directory, CYCLES, subject) as run:
            for batch in run.batches(loader):
                if len(used) == leave_after:
                    break
                self.update(subject, X)
                used.append(batch)
                self.step(run, subject)
        return used


class _Shuffled:
    """A loader whose order is drawn when an epoch begins."""

    def __iter__(self) -> Iterator[int]:
        yield from np.random.permutation(5).tolist()
