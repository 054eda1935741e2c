"""A run inside a trainer that keeps checkpoints of its own: the checkpoint says where the run resumes."""

import copy
import json
import signal
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import CosineCycles, CycleWarning, DivergedError, Program, ProtocolError, Restart, StoreError
from snapcore.run import Position, check_length
from snapcore.store import SnapshotStore

from .training import SIXTY, Loop, counts, members_of


class Trainer:
    """A trainer with checkpoints: weights and position together, saved after every `every` updates."""

    def __init__(self, directory, plan=SIXTY, every=7):
        self.directory, self.plan, self.every = directory, plan, every
        self.saved = None

    def train(self, until=60, *, killed=False, **options):
        """Resume from the last checkpoint; a kill leaves the run open, as if the process were gone."""
        weights, position = copy.deepcopy(self.saved) if self.saved else (None, {"step": 0, "members": []})
        loop = Loop(self.directory, self.plan, resumable=False, at=Position.from_dict(position), **options)
        if weights is not None:
            loop.weights = weights
        loop.events = list(loop.recorder.start())
        while loop.updates < until:
            loop.events += loop.step()
            if loop.updates % self.every == 0:
                position = json.loads(json.dumps(loop.recorder.position().to_dict()))
                self.saved = copy.deepcopy(loop.weights), position
        if killed:
            loop.recorder._saving.drain()
            loop.recorder.store.close()
        else:
            loop.recorder.close()
        return loop


@pytest.fixture
def trainer(tmp_path):
    return Trainer(tmp_path / "run")


def test_members_after_the_checkpoint_are_forgotten_and_taken_again(trainer):
    trainer.every = 35
    trainer.train(55, killed=True)
    assert [member.step for member in SnapshotStore(trainer.directory).members] == [20, 40]
    first = SnapshotStore(trainer.directory).members[0]
    loop = trainer.train()
    assert counts(loop) == [(20, 20), (40, 40), (60, 60)]
    assert SnapshotStore(trainer.directory).members[0] == first
    assert SnapshotStore(trainer.directory).stopped == "finished"
    members_of(trainer.directory)  # every file is what the manifest says


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_killed_anywhere_any_number_of_times_the_members_are_those_of_a_run_never_stopped(data, tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("run") / "run", every=data.draw(st.integers(1, 30)))
    for _ in range(data.draw(st.integers(0, 4))):
        begin = trainer.saved[1]["step"] if trainer.saved else 0
        if trainer.saved is None and (trainer.directory / "snapcore.json").exists():
            trainer.train(data.draw(st.integers(begin, 59)), killed=True, resume=False)
        else:
            trainer.train(data.draw(st.integers(begin, 59)), killed=True)
    loop = trainer.train(resume=False)  # matters only if no checkpoint was reached
    assert counts(loop) == [(20, 20), (40, 40), (60, 60)]
    assert loop.recorder.cursor.finished


def test_a_checkpoint_never_counts_a_member_that_is_not_on_disk(trainer):
    trainer.every = 20
    trainer.train(20, killed=True)
    (member,) = SnapshotStore(trainer.directory).members
    assert trainer.saved[1] == {"step": 20, "members": [member.sha256]}


def test_a_member_due_at_the_checkpoint_itself_but_not_taken_before_it_is_taken_from_its_weights(tmp_path):
    with Loop(tmp_path, at=Position(20)) as loop:
        loop.weights["updates"] += 20
        (snapshot,) = loop.recorder.start()
        assert (snapshot.step, snapshot.due) == (20, 20)
    assert counts(loop) == [(20, 20)]


def test_a_member_missed_before_the_checkpoint_is_taken_late_with_the_true_step(tmp_path):
    with Loop(tmp_path, at=Position(23)) as loop:
        loop.weights["updates"] += 23
        with pytest.warns(CycleWarning, match=r"due after update 20 .* 3 updates late"):
            loop.recorder.start()
    assert counts(loop) == [(23, 23)]


def test_a_restart_is_asked_for_only_if_it_was_not_done_before_the_checkpoint(tmp_path):
    plan = Program("star", SIXTY, Restart("first", "reset"))
    trainer = Trainer(tmp_path / "run", plan, every=20)
    trainer.train(20, killed=True)
    assert trainer.train(30, killed=True).events == []
    with Loop(tmp_path / "other", plan, at=Position(20)) as loop:
        assert loop.recorder.start()[1:] == (Restart("first", "reset"),)


def test_neither_resume_points_nor_signals_are_touched(trainer):
    before = signal.getsignal(signal.SIGTERM)
    trainer.train(30, killed=True, resume_every=5)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (trainer.directory / "resume").exists()
    assert trainer.train(59).copies == 3  # two rehearsals and the member at 40; none for a resume point when it is left


def test_a_run_left_early_says_who_knows_where_it_resumes(trainer, caplog):
    trainer.train(30)
    assert "left after 30 of 60 updates; it resumes where the trainer's checkpoint does" in caplog.text


def test_a_finished_run_resumes_from_a_checkpoint_before_its_end(trainer):
    trainer.every = 50
    trainer.train()
    assert counts(trainer.train(59)) == [(20, 20), (40, 40)]
    assert SnapshotStore(trainer.directory).stopped is None
    assert counts(trainer.train()) == [(20, 20), (40, 40), (60, 60)]


def test_a_finished_run_opened_at_its_end_stays_as_it_is(trainer):
    trainer.every = 60
    trainer.train()
    manifest = (trainer.directory / "snapcore.json").read_bytes()
    loop = trainer.train()
    assert loop.recorder.cursor.finished
    assert (trainer.directory / "snapcore.json").read_bytes() == manifest
    with pytest.raises(ProtocolError, match="stopped after 60 updates"):
        loop.recorder.cursor.advance()


def test_a_finished_run_is_not_begun_again(trainer):
    trainer.train()
    trainer.saved = None
    with pytest.raises(StoreError, match=r"holds a run that is finished \(3 members\)"):
        trainer.train()


def test_a_checkpoint_at_the_end_that_missed_the_last_member_has_it_taken_again(trainer):
    trainer.every = 60
    trainer.train()
    weights, position = trainer.saved
    trainer.saved = weights, {"step": 60, "members": position["members"][:2]}
    assert counts(trainer.train()) == [(20, 20), (40, 40), (60, 60)]
    assert SnapshotStore(trainer.directory).stopped == "finished"


def test_beginning_anew_on_members_is_refused_and_resume_false_moves_them_aside(trainer):
    trainer.every = 99
    trainer.train(30, killed=True)
    with pytest.raises(StoreError, match=r"1 members.*starts at update 0: have it resume from its checkpoint.*resume"):
        trainer.train()
    assert len(members_of(trainer.directory)) == 1
    assert counts(trainer.train(resume=False)) == [(20, 20), (40, 40), (60, 60)]
    assert len(members_of(trainer.directory.with_name("run.1"))) == 1


def test_resume_false_does_not_move_a_run_aside_that_a_checkpoint_resumes(trainer):
    trainer.every = 30
    trainer.train(30, killed=True)
    assert counts(trainer.train(resume=False)) == [(20, 20), (40, 40), (60, 60)]
    assert not trainer.directory.with_name("run.1").exists()


def test_the_checkpoint_of_another_training_is_refused_and_no_member_is_lost(tmp_path):
    ours, other = Trainer(tmp_path / "ours", every=25), Trainer(tmp_path / "other", every=25)
    other.plan = CosineCycles(0.1, 60, 3)
    other.train(25, killed=True)
    ours.train(45, killed=True)
    ours.saved = other.saved
    with pytest.raises(StoreError, match=r"does not hold the 1 members .* after update 25 counts"):
        ours.train()
    ours.saved = other.saved[0], {"step": 19, "members": []}
    ours.plan = other.plan
    with pytest.raises(StoreError, match="another program"):
        ours.train()
    assert len(members_of(tmp_path / "ours")) == 2


def test_a_run_with_resume_points_of_its_own_is_not_taken_over(trainer):
    with Loop(trainer.directory, resume_every=5) as loop:
        for _ in range(7):
            loop.step()
    with pytest.raises(StoreError, match="with resume points of its own"):
        trainer.train()


def test_a_member_that_was_refused_stops_the_checkpoint(tmp_path):
    loop = Loop(tmp_path, resumable=False, at=Position())
    loop.recorder.start()
    loop.weights["updates"] = np.array(np.nan)
    loop.step(20)
    with pytest.raises(DivergedError, match="member 1"):
        loop.recorder.position()
    with pytest.raises(ProtocolError, match="could not be written"):
        loop.recorder.position()
    loop.recorder.close()


def test_a_forgotten_member_whose_file_cannot_be_deleted_is_an_error(trainer):
    trainer.every = 30
    trainer.train(50, killed=True)
    path = trainer.directory / "snapshot-002.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="a forgotten member cannot be deleted"):
        trainer.train()


def test_a_reader_of_the_store_forgets_nothing(trainer):
    trainer.train()
    with pytest.raises(StoreError, match="mode='w'"):
        SnapshotStore(trainer.directory).truncate(1)


@pytest.mark.parametrize(
    "values",
    [{}, {"step": 3}, {"step": "3", "members": []}, {"step": 3, "members": [4]}, {"step": 3, "members": [], "more": 1}],
)
def test_what_is_no_position_is_refused(values):
    with pytest.raises(ProtocolError, match="a position has a step and the digests of members"):
        Position.from_dict(values)


class Together:
    """Processes as threads: `gather` waits for all."""

    def __init__(self, rank, shared):
        self.rank, self.size = rank, 2
        self.shared, self.barrier = shared

    def gather(self, value):
        self.shared[self.rank] = value
        self.barrier.wait(10)
        values = list(self.shared)
        self.barrier.wait(10)
        return values


def test_every_process_of_a_group_resumes_at_the_same_position(tmp_path):
    trainer = Trainer(tmp_path / "run", Program("star", SIXTY, Restart("first", "reset")), every=30)
    trainer.train(45, killed=True)
    shared = [None, None], threading.Barrier(2)
    events, positions = [None, None], [None, None]

    def process(rank):
        loop = Loop(
            trainer.directory, trainer.plan, at=Position.from_dict(trainer.saved[1]), group=Together(rank, shared)
        )
        with loop:
            loop.recorder.start()
            events[rank] = [event for _ in range(30) for event in loop.step()]
            positions[rank] = loop.recorder.position()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events[0] == events[1] != []
    assert [position.step for position in positions] == [60, 60]
    assert [len(position.members) for position in positions] == [3, 0]


def test_a_trainer_of_the_programs_length_or_without_one_is_fine():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_length(Program("snapshot", SIXTY), 60, "max_steps")
        check_length(Program("snapshot", SIXTY), float("inf"), "max_steps")


def test_a_trainer_that_continues_after_the_program_is_refused():
    with pytest.raises(ProtocolError, match=r"to do 61 updates, the program ends after 60: pass max_steps=60, or"):
        check_length(Program("snapshot", SIXTY), 61, "max_steps")


def test_a_trainer_that_ends_before_the_last_members_is_warned_of():
    with pytest.warns(CycleWarning, match=r"after 39 of the program's 60 updates, and 2 of its members.*max_steps=60"):
        check_length(Program("snapshot", SIXTY), 39, "max_steps")
