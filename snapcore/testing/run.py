"""The rules that every run must keep, whoever drives the loop, as tests to inherit.

`RunConformance` sees a run from outside: it has a training begun in a directory, looks at the training's own weights
around every update, and compares with them what lies on disk. So it serves a trainer's callback as well. For a loop
that one writes oneself, inherit `LoopConformance`.
"""

import errno
import functools
import itertools
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from snapcore.errors import CorruptSnapshotError, DivergedError, ProtocolError, StoreError
from snapcore.protocol import Program, Restart, as_program
from snapcore.schedule import CosineCycles, Schedule
from snapcore.store import SnapshotStore, read_point
from snapcore.testing.arrays import Arrays, assert_equal, frozen

Act = Callable[[int, Any], None]

CYCLES = CosineCycles(0.1, 13, 3, warmup_steps=2, remainder="even")
"""Members are due after 6, 10 and 13 updates: the first cycle begins late, and the last one is shorter."""
STAR = Program("star", CYCLES, Restart("first", "reset"))
KEEP = Program("keep", CYCLES, Restart("first", "keep"))
FRESH = Program("singlecycle", CYCLES, Restart("fresh", "reset"))
X: NDArray[np.float32] = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)
"""What an update takes, and what an ensemble is asked about."""


class Stopped(Exception):  # noqa: N818 - it stands for the end of a process, which is no error
    """Ends a training from within."""


@dataclass
class Training:
    """What one process has done, update by update."""

    rates: list[float] = field(default_factory=list)
    """That of each update, as the optimizer had it."""
    before: list[Arrays] = field(default_factory=list)
    """The weights that each update began with."""
    after: list[Arrays] = field(default_factory=list)
    """The weights that each update led to."""
    moments_before: list[list[NDArray[Any]]] = field(default_factory=list)
    """The optimizer's moments that each update began with."""
    moments_after: list[list[NDArray[Any]]] = field(default_factory=list)
    """The optimizer's moments that each update led to."""


class RunConformance:
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

    framework: ClassVar[str]
    cycles: ClassVar[Schedule] = CYCLES
    x: ClassVar[NDArray[np.float32]] = X
    patience: ClassVar[float] = 10.0

    def new(self, seed: int, schedule: Schedule) -> Any:
        """Return a subject as a new process makes it, its weights and random states drawn from the seed."""
        raise NotImplementedError

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
        """Train under a run in `directory` until the program stops.

        Arguments:
            directory: the run's own.
            cycles: what it walks.
            subject: what it trains.
            before: to be called before every update.
            after: to be called after every update, before the run hears of it; what it raises is not caught. If it
                returns True, training is left as one leaves it early, once the run has heard of the update.
            options: for the run: `resume`, `resume_every`, `init`.
        """
        raise NotImplementedError

    def init(self, seed: int, schedule: Schedule) -> Any:
        """Return the weights of `new(seed, schedule)` in the form in which `init=` gives them."""
        raise NotImplementedError

    def weights(self, subject: Any) -> Arrays:
        """Return all that the forward pass needs, buffers too, by the names of a member."""
        raise NotImplementedError

    def moments(self, subject: Any) -> list[NDArray[Any]]:
        """Return the optimizer's moments; of a new optimizer all are zero, or there are none."""
        raise NotImplementedError

    def rate(self, subject: Any) -> float:
        """Return the rate of the next update, as the optimizer has it."""
        raise NotImplementedError

    def spoil(self, subject: Any) -> None:
        """Make one of the weights NaN."""
        raise NotImplementedError

    def ensemble(self, directory: Path, x: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return what an ensemble of the directory gives for `x`: the mean of its members, and each of them."""
        raise NotImplementedError

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
        _assert_all_equal(self._train(tmp_path / "run", resume_every=1).after, self._undisturbed().training.after)

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
            _assert_all_equal(resumed.after, self._undisturbed(program).training.after[10:])

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

    # ------------------------------------------------------------------------------------------------------------------

    @classmethod
    @functools.cache
    def _undisturbed(cls, cycles: Schedule | Program = CYCLES) -> "_Undisturbed":
        """Return a training that was never stopped, and what it has left; done once for a suite."""
        with tempfile.TemporaryDirectory() as folder:
            training, store = cls()._train(Path(folder) / "run", cycles), SnapshotStore(Path(folder) / "run")
            tensors = [frozen(store.load(member.index)) for member in store.members]
            return _Undisturbed(training, store.members, tensors, store.stopped)

    def _train(
        self,
        directory: Path,
        cycles: Schedule | Program = CYCLES,
        *,
        seed: int = 0,
        leave_after: int | None = None,
        act: Act | None = None,
        **options: Any,
    ) -> Training:
        """Train as a new process would, and return what was seen.

        Arguments:
            directory: the run's own.
            cycles: what it walks.
            seed: of weights and random states; what resumes is begun with another.
            leave_after: updates of this process after which to leave early.
            act: called after every update with their number and the subject.
            options: for the run.
        """
        random.seed(seed)
        np.random.seed(seed)
        program = as_program(cycles)
        if program.between.source == "fresh":
            options.setdefault("init", self._fresh)
        subject, training = self.new(seed, program.schedule), Training()

        def before() -> None:
            training.rates.append(float(self.rate(subject)))
            training.before.append(frozen(self.weights(subject)))
            training.moments_before.append([np.array(each) for each in self.moments(subject)])

        def after() -> bool:
            training.after.append(frozen(self.weights(subject)))
            training.moments_after.append([np.array(each) for each in self.moments(subject)])
            if act is not None:
                act(len(training.after), subject)
            return len(training.after) == leave_after

        self.train(directory, cycles, subject, before=before, after=after, **options)
        return training

    def _killed(
        self, directory: Path, cycles: Schedule | Program = CYCLES, *, update: int, point: int, **options: Any
    ) -> Path:
        """Return a copy of the directory of a training as it is in that update, once its resume point is on disk."""
        left = directory.with_name(f"{directory.name} killed")

        def act(done: int, subject: Any) -> None:  # noqa: ARG001
            if done == update:
                self._wait(directory, point)
                shutil.copytree(directory, left)
                raise Stopped

        with suppress(Stopped):
            self._train(directory, cycles, act=act, **options)
        return left

    def _fresh(self, number: int) -> Any:
        return self.init(100 + number, CYCLES)

    def _wait(self, directory: Path, step: int) -> None:
        """Wait until the resume point of that update is on disk, and all members up to it."""
        due, end = [each for each in CYCLES.snapshot_steps if each <= step], time.monotonic() + self.patience
        while time.monotonic() < end:
            with suppress(CorruptSnapshotError):  # it was replaced while it was read
                if (steps(directory), point_at(directory)) == (due, step):
                    return
            time.sleep(0.002)

    def _assert_resumes(self, directory: Path, step: int) -> None:
        """Assert that a new process does the updates after `step`, and each of them as if it had never been stopped."""
        _assert_all_equal(self._train(directory, seed=1).after, self._undisturbed().training.after[step:])


@dataclass(frozen=True)
class _Undisturbed:
    training: Training
    members: tuple[Any, ...]
    tensors: list[Arrays]
    stopped: str | None

    @property
    def steps(self) -> list[int]:
        return [member.step for member in self.members]


def steps(directory: Path) -> list[int]:
    """Return after how many updates the members were taken."""
    return [member.step for member in SnapshotStore(directory).members]


def point_at(directory: Path) -> int | None:
    """Return after how many updates the resume point was taken; None if there is none."""
    point = read_point(directory)
    return None if point is None else int(point.state["place"]["step"])


def _assert_all_equal(found: list[Arrays], expected: list[Arrays]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
