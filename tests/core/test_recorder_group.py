"""Several processes that train one model, played by threads: one writes, all are at the same position."""

import os
import queue
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from snapcore import CosineCycles, Program, ProtocolError, Restart, StoreError, program
from snapcore.store import SnapshotStore, read_point

from .training import Copied, Loop, NumpyBackend, assert_same, managed, members_of, simulate

LONG = CosineCycles(0.2, 200, 2)


class GoneError(Exception):
    """The other process waits for one that has ended."""


class Processes:
    """Two of them meet whenever they gather; where one has ended, the other's gathering fails."""

    def __init__(self):
        self.letters = [queue.Queue(), queue.Queue()]

    def process(self, rank):
        return SimpleNamespace(rank=rank, size=2, gather=lambda value: self.gather(rank, value))

    def gather(self, rank, value):
        self.letters[1 - rank].put(value)
        other = self.letters[rank].get(timeout=60)
        if other is GoneError:
            raise GoneError
        return [value, other] if rank == 0 else [other, value]

    def run(self, work):
        """Do `work(group)` as both, process 0 in the main thread; return what each returned or raised."""
        results = [None, None]

        def do(rank):
            try:
                results[rank] = work(self.process(rank))
            except BaseException as error:  # noqa: BLE001  it is the test's to judge
                results[rank] = error
            self.letters[1 - rank].put(GoneError)

        other = threading.Thread(target=do, args=(1,))
        other.start()
        do(0)
        other.join()
        return results


def both(work):
    return Processes().run(work)


class Marked(Loop):
    """Each process has random states of its own."""

    def __init__(self, directory, plan, group, **options):
        self.mark = f"of process {group.rank}"
        super().__init__(directory, plan, group=group, **options)

    def random_state(self):
        return self.mark

    def set_random_state(self, state):
        self.mark = state


def alone(rank, answer):
    """A process whose gathering is answered by the test."""
    return SimpleNamespace(rank=rank, size=2, gather=answer)


def test_one_process_writes_and_both_have_the_same_state_in_the_end(tmp_path):
    plan = program("star", lr=0.2, steps=60, cycles=3)
    states = both(lambda group: managed(tmp_path, plan, seed=4, group=group, resume_every=7))
    assert_same([states[0].weights], [states[1].weights])
    assert_same(members_of(tmp_path), simulate(plan, 4))
    assert sorted(path.name for path in tmp_path.iterdir())[2:] == [f"snapshot-00{k}.safetensors" for k in (1, 2, 3)]


def test_the_other_process_writes_nothing_and_has_no_store(tmp_path):
    group = alone(1, lambda value: [None, value])
    with Loop(tmp_path / "run", group=group, resume_every=5) as loop:
        for n in (12, 8, 20):
            loop.step(n)
        with pytest.raises(ProtocolError, match="only process 0 writes"):
            assert loop.recorder.store
        loop.recorder.finish("enough")
    assert list(tmp_path.iterdir()) == []


def test_both_resume_at_the_same_position_each_with_random_states_of_its_own(tmp_path):
    def begin(group):
        with Marked(tmp_path, LONG, group) as loop:
            loop.step(30)

    def resume(group):
        with Marked(tmp_path, LONG, group) as loop:
            loop.mark = "lost"
            loop.recorder.start()
            return loop.recorder.cursor.step, loop.updates, loop.mark

    assert both(begin) == [None, None]
    assert both(resume) == [(30, 30, "of process 0"), (30, 30, "of process 1")]


def test_each_has_its_own_position_in_the_data(tmp_path):
    def until(update):
        def train(group):
            seen = []
            with Marked(tmp_path, LONG, group) as loop:
                loop.recorder.start()
                for batch in loop.recorder.batches([f"{group.rank}{letter}" for letter in "abcde"]):
                    seen.append(batch)
                    loop.step()
                    if loop.updates == update:
                        return seen
            return seen

        return train

    assert both(until(3)) == [["0a", "0b", "0c"], ["1a", "1b", "1c"]]
    assert both(until(6)) == [["0d", "0e", "0a"], ["1d", "1e", "1a"]]


def test_with_another_number_of_processes_all_resume_with_the_states_of_the_first(tmp_path):
    def begin(group):
        with Marked(tmp_path, LONG, group) as loop:
            loop.step(30)

    both(begin)
    with Marked(tmp_path, LONG, SimpleNamespace(rank=0, size=1, gather=lambda value: [value])) as loop:
        loop.mark = "lost"
        loop.recorder.start()
        assert (loop.updates, loop.mark) == (30, "of process 0")


def test_a_refusal_on_the_first_process_is_raised_on_the_other_as_well(tmp_path):
    managed(tmp_path)
    errors = both(lambda group: managed(tmp_path, group=group))
    assert [type(error) for error in errors] == [StoreError, StoreError]
    assert str(errors[0]) == str(errors[1])
    assert "holds a run that is finished" in str(errors[1])


def test_the_other_process_waits_until_the_directory_is_open(tmp_path):
    """What it then reads is what process 0 has rolled forward or moved aside."""
    managed(tmp_path / "run")
    order = []

    def open_it(group):
        gather = group.gather
        group.gather = lambda value: order.append((tmp_path / "run.1").exists()) or gather(value)
        with Loop(tmp_path / "run", resume=False, group=group) as loop:
            return loop.recorder.start(), (tmp_path / "run.1").exists()

    assert both(open_it) == [((), True)] * 2
    assert True in order


def test_one_that_fails_alone_does_not_write_a_position_that_the_other_has_not(tmp_path):
    def train(group):
        with Loop(tmp_path, LONG, group=group) as loop:
            loop.step(30)
            if group.rank == 1:
                raise KeyError("mine")

    errors = both(train)
    assert [type(error) for error in errors] == [GoneError, KeyError]
    assert read_point(tmp_path) is None
    SnapshotStore(tmp_path, "w").close()


def test_every_process_restarts_from_the_first_member_once_it_is_on_disk(tmp_path):
    plan = Program("star", LONG, Restart("first", "reset"))

    def train(group):
        with Loop(tmp_path, plan, group=group) as loop:
            loop.step(100)
            return int(loop.restored[0]["updates"])

    assert both(train) == [100, 100]


# ------------------------------------------------------------------------------------------------ SIGTERM


@pytest.fixture(autouse=True)
def _default():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL


def terminated_at(update, directory, plan=LONG):
    """Where each process leaves, if the first gets the signal before that update."""
    positions = {}

    def train(group):
        with Loop(directory, plan, group=group) as loop:
            for step in range(loop.recorder.program.updates):
                if (group.rank, step) == (0, update):
                    os.kill(os.getpid(), signal.SIGTERM)
                positions[group.rank] = step + 1
                loop.step()

    errors = both(train)
    assert [getattr(error, "code", error) for error in errors] == [143, 143]
    return positions


@pytest.mark.parametrize(("update", "expected"), [(49, 50), (50, 100), (120, 150)])
def test_all_leave_at_the_same_update_and_the_first_writes_the_point(tmp_path, update, expected):
    assert terminated_at(update, tmp_path) == {0: expected, 1: expected}
    assert read_point(tmp_path).state["place"]["step"] == expected
    assert len(members_of(tmp_path)) == expected // 100


def test_a_signal_shortly_before_the_end_is_heard_at_the_end(tmp_path):
    assert terminated_at(57, tmp_path, CosineCycles(0.2, 60, 3)) == {0: 60, 1: 60}
    assert SnapshotStore(tmp_path).stopped == "finished"


def test_updates_recorded_in_bulk_agree_when_they_pass_the_moment(tmp_path):
    asked = []
    group = alone(0, lambda value: asked.append(value) or [value, value])
    with Loop(tmp_path, LONG, group=group, resumable=False) as loop:
        asked.clear()
        for n in (30, 30, 30, 0):
            loop.step(n)
        assert asked == [None, 0]  # whether the rehearsal was refused, and whether a signal has come


def test_a_signal_to_another_process_ends_this_one(tmp_path):
    group = alone(1, lambda value: [signal.SIGTERM if value == 0 else None, value])
    with Loop(tmp_path, LONG, group=group) as loop:
        loop.step(49)
        with pytest.raises(SystemExit) as caught:
            loop.step()
    assert caught.value.code == 143


def test_a_backend_is_asked_for_a_copy_on_every_process(tmp_path):
    """Gathering sharded weights needs all of them, though one writes."""
    asked = []

    class Sharded(NumpyBackend):
        def dump(self, state):
            asked.append(threading.get_ident())
            return super().dump(state)

        def capture(self, state):
            asked.append(threading.get_ident())
            return Copied({**state.weights, "extra": np.zeros(1)})

    both(lambda group: managed(tmp_path, Program("two", CosineCycles(0.1, 20, 2)), Sharded(), group=group))
    assert sorted(asked.count(thread) for thread in set(asked)) == [4, 4]  # two members, and two rehearsals
