"""The rules that every run must keep, whoever drives the loop, as tests to inherit.

`RunConformance` sees a run from outside: it has a training begun in a directory, looks at the training's own weights
around every update, and compares with them what lies on disk. So it serves a trainer's callback as well. For a loop
that one writes oneself, inherit `LoopConformance`.
"""

import errno
import itertools
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapcore.errors import DivergedError, ProtocolError, StoreError
from snapcore.protocol import Program, Restart
from snapcore.schedule import CosineCycles
from snapcore.store import SnapshotStore
from snapcore.testing.arrays import assert_all_equal, assert_equal, frozen
from snapcore.testing.trainings import CYCLES, FRESH, KEEP, STAR, Stopped, Trainings, X, point_at, steps


class RunConformance(Trainings):
    """Inherit, override what raises `NotImplementedError`, and let pytest collect the rules.

    A *subject* is what is trained, in whatever form the loop holds it: a model and its optimizer, most often. The model
    should have buffers that training moves (batch statistics) and draw random numbers (dropout), and the optimizer
    should have moments. An update takes `x`, float32 [6, 3], always the same; whatever loss it makes of that will do.

    Attributes:
        framework: the name that members bear.
        patience: seconds to wait for a file that should come.
        cycles: given: the schedule of most rules.
        x: given: what an update takes, float32 [6, 3]; always the same.
    """

    # ------------------------------------------------------------------------------------------------ what is taken

    def test_rule_01_a_member_is_taken_after_the_last_update_of_every_cycle(self) -> None:
        """Rule 1: the last one too, where training ends on it."""
        assert self._undisturbed().steps == [*CYCLES.snapshot_steps]
        assert self._undisturbed().stopped == "finished"

    def test_rule_02_a_member_is_the_loops_own_weights_bit_for_bit(self) -> None:
        """Rule 2: all of them, buffers too, as they are after that update."""
        undisturbed = self._undisturbed()
        for member, tensors in zip(undisturbed.members, undisturbed.tensors, strict=True):
            assert_equal(tensors, undisturbed.training.after[member.step - 1])

    def test_rule_03_later_updates_do_not_change_a_member(self, tmp_path: Path) -> None:
        """Rule 3: however late it is written. The disk is busy with a resume point until after the next update."""
        free, flush = threading.Event(), os.fsync

        def slow(descriptor: int) -> None:
            free.wait(self.patience)
            flush(descriptor)

        def act(update: int, subject: Any) -> None:  # noqa: ARG001
            if update == 4:
                patch.setattr(os, "fsync", slow)
            if update == 7:
                free.set()

        with pytest.MonkeyPatch.context() as patch:
            training = self._train(tmp_path / "run", act=act, resume_every=4, leave_after=7)
        assert_equal(SnapshotStore(tmp_path / "run").load(1), training.after[5])

    def test_rule_04_the_manifest_says_what_each_member_is(self) -> None:
        """Rule 4: when it was due, in which cycle, at which rate its last update was done, and who wrote it."""
        for position, member in enumerate(self._undisturbed().members):
            facts = (member.index, member.cycle, member.due, member.lr, member.framework, member.unfinished)
            due = CYCLES.snapshot_steps[position]
            assert facts == (position + 1, position, due, CYCLES(member.step - 1), self.framework, False)

    def test_rule_05_the_rate_of_every_update_is_the_schedules(self) -> None:
        """Rule 5: after a restart too."""
        for training in (self._undisturbed().training, self._undisturbed(STAR).training):
            expected = [CYCLES(step) for step in range(len(training.rates))]
            np.testing.assert_allclose(training.rates, expected, rtol=0, atol=1e-6 * CYCLES.lr)

    def test_rule_06_training_ends_with_the_program(self) -> None:
        """Rule 6: whatever else was asked of it, such as more epochs."""
        assert len(self._undisturbed().training.after) == CYCLES.steps

    def test_rule_07_members_and_resume_points_change_nothing_that_follows(self, tmp_path: Path) -> None:
        """Rule 7: a run that copies after every update has the same weights."""
        assert_all_equal(self._train(tmp_path / "run", resume_every=1).after, self._undisturbed().training.after)

    # ----------------------------------------------------------------------------------------------- how it is opened

    def test_rule_08_a_finished_run_is_refused_or_moved_aside(self, tmp_path: Path) -> None:
        """Rule 8: with `resume=False` it lies beside the new one."""
        self._train(tmp_path / "run")
        members = SnapshotStore(tmp_path / "run").members
        with pytest.raises(StoreError, match="finished"):
            self._train(tmp_path / "run")
        self._train(tmp_path / "run", resume=False, leave_after=1)
        assert steps(tmp_path / "run") == []
        aside = SnapshotStore(tmp_path / "run.1")
        aside.verify()
        assert aside.members == members

    def test_rule_09_another_program_is_refused(self, tmp_path: Path) -> None:
        """Rule 9: and the run that is there can still be resumed."""
        self._train(tmp_path / "run", leave_after=8)
        with pytest.raises(StoreError, match="another program"):
            self._train(tmp_path / "run", CosineCycles(0.1, 13, 2, warmup_steps=2, remainder="even"))
        assert steps(tmp_path / "run") == [6]
        assert point_at(tmp_path / "run") == 8

    def test_rule_10_one_writes_at_a_time(self, tmp_path: Path) -> None:
        """Rule 10: nobody else while it trains, and not it while another does."""
        directory = tmp_path / "run"

        def intrude(update: int, subject: Any) -> None:  # noqa: ARG001
            with pytest.raises(StoreError, match="being written"):
                SnapshotStore(directory, "w")

        self._train(directory, act=intrude, leave_after=2)
        with SnapshotStore(directory, "w"), pytest.raises(StoreError, match="being written"):
            self._train(directory)

    # ----------------------------------------------------------------------------------------- how it ends, and resumes

    def test_rule_11_leaving_early_takes_no_member(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Rule 11: and the log says how far it came."""
        self._train(tmp_path / "run", leave_after=8)
        assert steps(tmp_path / "run") == [6]
        assert "8 of 13 updates" in caplog.text

    def test_rule_12_a_run_left_early_resumes_exactly(self, tmp_path: Path) -> None:
        """Rule 12: from the update that was its last, with weights, moments and random states."""
        self._train(tmp_path / "run", leave_after=8)
        self._assert_resumes(tmp_path / "run", 8)

    def test_rule_13_a_killed_run_resumes_exactly_from_the_last_member(self, tmp_path: Path) -> None:
        """Rule 13: the process had no time to write anything."""
        self._assert_resumes(self._killed(tmp_path / "run", update=8, point=6), 6)

    def test_rule_14_a_killed_run_resumes_exactly_from_the_last_point_asked_for(self, tmp_path: Path) -> None:
        """Rule 14: one lies at every multiple of `resume_every`."""
        self._assert_resumes(self._killed(tmp_path / "run", update=9, point=8, resume_every=4), 8)

    def test_rule_15_sigterm_takes_no_member_and_the_run_resumes_exactly(self, tmp_path: Path) -> None:
        """Rule 15: the update under way is the last, and the exit code is 143."""

        def terminate(update: int, subject: Any) -> None:  # noqa: ARG001
            if update == 8:
                os.kill(os.getpid(), signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with pytest.raises(SystemExit) as left:
                self._train(tmp_path / "run", act=terminate)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert left.value.code == 143
        assert steps(tmp_path / "run") == [6]
        self._assert_resumes(tmp_path / "run", 8)

    def test_rule_16_an_exception_passes_through_and_the_members_stay(self, tmp_path: Path) -> None:
        """Rule 16: the directory is free for the next training, which finishes the run."""

        def stop(update: int, subject: Any) -> None:  # noqa: ARG001
            if update == 8:
                raise Stopped

        with pytest.raises(Stopped):
            self._train(tmp_path / "run", act=stop)
        store = SnapshotStore(tmp_path / "run")
        store.verify()
        assert ([member.step for member in store.members], store.stopped) == ([6], None)
        self._train(tmp_path / "run")
        assert steps(tmp_path / "run") == self._undisturbed().steps

    # ------------------------------------------------------------------------------------------------ between members

    def test_rule_17_fresh_weights_come_from_init_by_the_members_number(self, tmp_path: Path) -> None:
        """Rule 17: 2 for the second, 3 for the third."""
        asked: list[int] = []

        def init(number: int) -> Any:
            asked.append(number)
            return self._fresh(number)

        training = self._train(tmp_path / "run", FRESH, init=init)
        assert asked == [2, 3]
        for number in asked:
            begun = training.before[CYCLES.snapshot_steps[number - 2]]
            assert_equal(begun, frozen(self.weights(self.new(100 + number, CYCLES))))

    def test_rule_18_fresh_weights_without_init_are_refused(self, tmp_path: Path) -> None:
        """Rule 18: before anything is written."""
        with pytest.raises(ProtocolError, match="init="):
            self._train(tmp_path / "run", FRESH, init=None)
        assert not (tmp_path / "run").exists()

    def test_rule_19_a_restart_from_the_first_brings_its_weights_back(self) -> None:
        """Rule 19: buffers too."""
        for program in (STAR, KEEP):
            training = self._undisturbed(program).training
            for due in CYCLES.snapshot_steps[:-1]:
                assert_equal(training.before[due], training.after[CYCLES.snapshot_steps[0] - 1])

    def test_rule_20_moments_are_reset_if_so_asked_and_kept_else(self, tmp_path: Path) -> None:
        """Rule 20: without a restart they are kept; the weights stay in any case, if no others are asked for."""
        due, reset = CYCLES.snapshot_steps[0], Program("reset", CYCLES, Restart("previous", "reset"))
        training = self._train(tmp_path / "run", reset, leave_after=due + 1)
        assert any(map(np.any, training.moments_after[due - 1]))
        assert not any(map(np.any, training.moments_before[due]))
        assert_equal(training.before[due], training.after[due - 1])
        for cycles in (CYCLES, KEEP):
            training = self._undisturbed(cycles).training
            for one, other in zip(training.moments_after[due - 1], training.moments_before[due], strict=True):
                np.testing.assert_array_equal(one, other)
            assert_equal(training.before[due], training.after[due - 1])

    def test_rule_21_a_restart_that_was_due_is_done_by_the_training_that_resumes(self, tmp_path: Path) -> None:
        """Rule 21: killed right after a member, its weights are those of a run that was never stopped."""
        for program in (STAR, FRESH):
            left = self._killed(tmp_path / program.method, program, update=11, point=10)
            resumed = self._train(left, program, seed=1)
            assert_all_equal(resumed.after, self._undisturbed(program).training.after[10:])

    # -------------------------------------------------------------------------------------------------- what goes wrong

    def test_rule_22_weights_that_are_not_finite_become_no_member(self, tmp_path: Path) -> None:
        """Rule 22: those before stay, and the run is not called finished."""

        def spoil(update: int, subject: Any) -> None:
            if update == 8:
                self.spoil(subject)

        with pytest.raises(DivergedError, match="member 2 at update 10"):
            self._train(tmp_path / "run", act=spoil)
        store = SnapshotStore(tmp_path / "run")
        assert ([member.step for member in store.members], store.stopped) == ([6], None)

    def test_rule_23_a_disk_that_refuses_a_member_stops_the_training(self, tmp_path: Path) -> None:
        """Rule 23: nothing half-written is left, and the same training started again finishes the run."""

        def refuse(descriptor: int) -> None:  # noqa: ARG001
            raise OSError(errno.ENOSPC, "No space left on device")

        def act(update: int, subject: Any) -> None:  # noqa: ARG001
            if update == 9:
                self._wait(tmp_path / "run", 6)
                patch.setattr(os, "fsync", refuse)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(StoreError, match="No space left on device"):
            self._train(tmp_path / "run", act=act)
        SnapshotStore(tmp_path / "run").verify()
        assert steps(tmp_path / "run") == [6]
        assert not [*(tmp_path / "run").rglob(".tmp*")]
        self._train(tmp_path / "run")
        assert steps(tmp_path / "run") == self._undisturbed().steps

    # ------------------------------------------------------------------------------------------------- what it is for

    def test_rule_24_an_ensemble_is_the_mean_of_its_members_probabilities(self, tmp_path: Path) -> None:
        """Rule 24: of all members, each of which has its own opinion."""
        self._train(tmp_path / "run")
        mean, members = self.ensemble(tmp_path / "run", X)
        assert members.shape[:2] == (len(self._undisturbed().steps), len(X))
        np.testing.assert_allclose(members.sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(mean, members.mean(0), rtol=1e-5)
        assert all(np.any(one != other) for one, other in itertools.pairwise(members))
