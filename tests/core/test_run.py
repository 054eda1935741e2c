"""A run, pushed by a loop or managed: what lands in its directory, against a simulation without cursor or store."""

import copy
import itertools
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import (
    CosineCycles,
    CycleWarning,
    DivergedError,
    Program,
    ProtocolError,
    Restart,
    ScheduleError,
    Snapshot,
    Stop,
    StoreError,
    program,
)
from snapcore.data import TrainingData
from snapcore.run import Recorder, execute
from snapcore.store import SnapshotStore

SIXTY = CosineCycles(0.2, 60, 3)  # members after 20, 40 and 60 updates
X = np.random.default_rng(0).normal(size=(12, 3))
DATA = TrainingData(X, np.zeros(12, int), n_classes=1, batch_size=4)


# ------------------------------------------------------------------------------------------------ a backend in NumPy


class Copied:
    """A pending capture: the copy is made here and now, and handed over later."""

    def __init__(self, weights):
        self.weights = copy.deepcopy(weights)

    def resolve(self):
        return self.weights


def weights_of(seed, member):
    return {"w": np.random.default_rng([seed, member]).normal(size=3), "updates": np.zeros((), np.int64)}


def update(weights, moment, rate, batch):
    """Momentum towards the batch's mean, in place: a capture that is no copy would change with it."""
    moment *= 0.9
    moment += weights["w"] - batch.mean(axis=0)
    weights["w"] -= rate * moment
    weights["updates"] += 1


@dataclass
class NumpyBackend:
    """The smallest backend: a quadratic, momentum, and a log of what it was told."""

    loss: object = staticmethod(lambda step: 1.0)
    spoil: int | None = None
    name: str = "numpy"
    log: list = field(default_factory=list)

    def init(self, model, data, program, *, seed, member=1, scale=1.0):
        self.log.append(("init", model, member))
        weights = weights_of(seed, member)
        weights["w"] *= scale
        return SimpleNamespace(weights=weights, moment=np.zeros(3), data=data, program=program)

    def train(self, state, start, stop, *, report):
        self.log.append(("train", start, stop))
        for step, batch in enumerate(state.data.indices(start, stop), start):
            update(state.weights, state.moment, state.program.schedule(step), state.data.x[batch])
            if step == self.spoil:
                state.weights["w"][1] = np.nan
            report(step + 1, self.loss(step + 1))
        return state

    def capture(self, state):
        return Copied(state.weights)

    def restore(self, state, tensors, *, optimizer):
        self.log.append(("restore", None if tensors is None else tensors["w"].tolist(), optimizer))
        if tensors is not None:
            state.weights = {name: np.array(value) for name, value in tensors.items()}
        if optimizer == "reset":
            state.moment = np.zeros(3)
        return state


def simulate(plan, seed):
    """The same training as one loop: no cursor, no program walked, no files."""
    weights, moment, members = weights_of(seed, 1), np.zeros(3), []
    for step in range(plan.updates):
        if members and step in plan.schedule.snapshot_steps:
            weights = {
                "previous": weights,
                "first": copy.deepcopy(members[0]),
                "fresh": weights_of(seed, len(members) + 1),
            }[plan.between.source]
            moment = np.zeros(3) if plan.between.optimizer == "reset" else moment
        update(weights, moment, plan.schedule(step), X[DATA.indices(step, step + 1)[0]])
        if step + 1 in plan.schedule.snapshot_steps:
            members.append(copy.deepcopy(weights))
    return members


def run(directory, plan=None, backend=None, **options):
    plan = plan or program("snapshot", lr=0.2, steps=60, cycles=3)
    return execute(plan, backend or NumpyBackend(), model="quadratic", data=DATA, directory=directory, **options)


def members_of(directory):
    store = SnapshotStore(directory)
    store.verify()
    return [store.load(member.index) for member in store.members]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {name: value.tolist() for name, value in one.items()} == {n: v.tolist() for n, v in other.items()}


# ------------------------------------------------------------------------------------------------ managed runs


def test_a_managed_run_records_each_member_with_its_place_and_rate(tmp_path):
    plan = program("snapshot", lr=0.2, steps=60, cycles=3)
    state = run(tmp_path / "run", plan, seed=5)
    store = SnapshotStore(tmp_path / "run")
    found = [(m.index, m.step, m.due, m.cycle, m.lr, m.framework, m.unfinished, m.metrics) for m in store.members]
    lr = plan.schedule(19)
    assert found == [(k, 20 * k, 20 * k, k - 1, lr, "numpy", False, None) for k in (1, 2, 3)]
    assert (store.program, store.stopped) == (plan.to_dict(), "finished")
    assert_same(members_of(tmp_path / "run"), simulate(plan, 5))
    assert state.weights["updates"] == 60


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 5),
    st.sampled_from(["paper", "even"]),
    st.sampled_from(
        [Restart(*words) for words in itertools.product(["previous", "first", "fresh"], ["keep", "reset"])]
    ),
    st.integers(0, 99),
)
def test_the_members_of_any_program_are_those_of_a_plain_loop(steps, cycles, remainder, between, seed):
    plan = Program("mine", CosineCycles(0.1, steps, min(cycles, steps), remainder=remainder), between)
    with tempfile.TemporaryDirectory() as directory:
        run(directory, plan, seed=seed)
        assert_same(members_of(directory), simulate(plan, seed))


def test_each_train_is_one_call_of_the_native_loop(tmp_path):
    backend = NumpyBackend()
    run(tmp_path, backend=backend)
    assert backend.log == [("init", "quadratic", 1), ("train", 0, 20), ("train", 20, 40), ("train", 40, 60)]


def test_a_restart_from_the_first_member_brings_its_weights_and_fresh_moments(tmp_path):
    backend = NumpyBackend()
    run(tmp_path, program("star", lr=0.2, steps=60, cycles=3), backend)
    first = SnapshotStore(tmp_path).load(1)["w"].tolist()
    assert [entry for entry in backend.log if entry[0] == "restore"] == [("restore", first, "reset")] * 2


def test_a_fresh_restart_asks_for_the_weights_of_the_next_member(tmp_path):
    backend = NumpyBackend()
    run(tmp_path, program("singlecycle", lr=0.2, steps=60, cycles=3), backend, seed=9)
    assert [entry[2] for entry in backend.log if entry[0] == "init"] == [1, 2, 3]
    expected = [("restore", weights_of(9, member)["w"].tolist(), "reset") for member in (2, 3)]
    assert [entry for entry in backend.log if entry[0] == "restore"] == expected


def test_a_restart_from_the_previous_weights_leaves_them_to_the_backend(tmp_path):
    backend = NumpyBackend()
    run(tmp_path, Program("mine", SIXTY, Restart("previous", "reset")), backend)
    assert [entry for entry in backend.log if entry[0] == "restore"] == [("restore", None, "reset")] * 2


def test_equal_seeds_give_equal_members_and_others_do_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, seed=seed)
    a, b, c = (members_of(tmp_path / name) for name in "abc")
    assert_same(a, b)
    assert a[0]["w"].tolist() != c[0]["w"].tolist()


def test_options_go_to_the_backend(tmp_path):
    backend = NumpyBackend(spoil=None)
    assert run(tmp_path, program("single", lr=1e-9, steps=1, cycles=1), backend, scale=0.0).weights["w"] == (
        pytest.approx([0, 0, 0], abs=1e-8)
    )


def test_every_loss_is_reported(tmp_path):
    heard = []
    run(tmp_path, backend=NumpyBackend(lambda step: step / 2), report=lambda *args: heard.append(args))
    assert heard == [(step, step / 2) for step in range(1, 61)]


def test_metrics_are_recorded_with_the_member_they_are_of(tmp_path):
    run(tmp_path, metrics=lambda snapshot, state: {"w0": state.weights["w"][0], "index": snapshot.index})
    store = SnapshotStore(tmp_path)
    expected = [{"w0": float(store.load(k)["w"][0]), "index": k} for k in (1, 2, 3)]
    assert [member.metrics for member in store.members] == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_members_before(tmp_path, bad):
    backend, heard = NumpyBackend(lambda step: bad if step == 45 else 1.0), []
    with pytest.raises(DivergedError, match=f"the loss of update 45 is {bad}; the members taken before are kept"):
        run(tmp_path, backend=backend, report=lambda *args: heard.append(args))
    assert len(heard) == 44
    assert_same(members_of(tmp_path), simulate(Program("it", SIXTY), 0)[:2])
    assert SnapshotStore(tmp_path).stopped is None


def test_weights_that_are_not_finite_become_no_member_and_the_ones_before_are_kept(tmp_path):
    with pytest.raises(DivergedError, match="member 2 at update 40 is refused: 1 of 3 values of 'w' are not finite"):
        run(tmp_path, backend=NumpyBackend(spoil=39))
    assert_same(members_of(tmp_path), simulate(Program("it", SIXTY), 0)[:1])
    assert SnapshotStore(tmp_path).stopped is None


def test_weights_spoilt_in_the_last_cycle_leave_the_run_unfinished(tmp_path):
    with pytest.raises(DivergedError, match="member 3 at update 60"):
        run(tmp_path, backend=NumpyBackend(spoil=59))
    store = SnapshotStore(tmp_path)
    assert ([member.index for member in store.members], store.stopped) == ([1, 2], None)


# ------------------------------------------------------------------------------------------------ opening a directory


def test_a_finished_run_opened_again_is_refused_before_anything_is_built(tmp_path):
    run(tmp_path)
    before, backend = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()), NumpyBackend()
    with pytest.raises(StoreError, match=r"holds a run that is finished \(3 members\): load it with") as caught:
        run(tmp_path, backend=backend)
    assert "choose another directory" in str(caught.value)
    assert "resume=False" in str(caught.value)
    assert backend.log == []
    after = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    assert [entry for entry in after if entry[0] != ".lock"] == [entry for entry in before if entry[0] != ".lock"]
    SnapshotStore(tmp_path, "w").close()  # the refusal freed the lock


def test_an_unfinished_run_opened_again_is_refused(tmp_path):
    with Recorder(tmp_path, SIXTY, framework="numpy") as recorder:
        recorder.record(20, lambda: Copied(weights_of(0, 1)))
    with pytest.raises(StoreError, match=r"holds an unfinished run \(1 members\)"):
        Recorder(tmp_path, SIXTY, framework="numpy")


def test_members_without_a_program_are_not_overwritten_either(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        store.save(weights_of(0, 1), index=1, step=1, cycle=0, lr=0.1, framework="numpy")
    with pytest.raises(StoreError, match="holds an unfinished run"):
        Recorder(tmp_path, SIXTY, framework="numpy")


def test_an_old_run_can_be_moved_aside(tmp_path):
    run(tmp_path / "run", seed=1)
    run(tmp_path / "run", seed=2, move_old_aside=True)
    run(tmp_path / "run", seed=3, move_old_aside=True)
    for name, seed in (("run.1", 1), ("run.2", 2), ("run", 3)):
        assert_same(members_of(tmp_path / name), simulate(Program("it", SIXTY), seed))


def test_where_there_is_no_run_nothing_is_moved_aside(tmp_path):
    run(tmp_path / "run", move_old_aside=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    with Recorder(tmp_path, SIXTY, framework="numpy") as first:
        for move in (False, True):
            with pytest.raises(StoreError, match="is being written by another run"):
                Recorder(tmp_path, SIXTY, framework="numpy", move_old_aside=move)
        first.record(20, lambda: Copied(weights_of(0, 1)))
    assert len(members_of(tmp_path)) == 1


def test_a_program_that_cannot_be_leaves_no_directory(tmp_path):
    with pytest.raises(ScheduleError):
        Recorder(tmp_path / "run", CosineCycles(0.2, 60, 0), framework="numpy")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ pushed runs


class Loop:
    """A user's loop: one weight that counts the updates, so that a member tells when it was copied."""

    def __init__(self, recorder):
        self.recorder, self.weights, self.captures = recorder, {"updates": np.zeros((), np.int64)}, 0

    def capture(self):
        self.captures += 1
        return Copied(self.weights)

    def step(self, n=1, **options):
        self.weights["updates"] += n
        return self.recorder.record(n, self.capture, **options)

    def finish(self, reason):
        return self.recorder.finish(reason, self.capture)


@pytest.fixture
def loop(tmp_path):
    with Recorder(tmp_path / "run", SIXTY, framework="numpy") as recorder:
        yield Loop(recorder)


def counts(loop):
    loop.recorder.close()
    store = SnapshotStore(loop.recorder.directory)
    return [(member.step, int(store.load(member.index)["updates"])) for member in store.members]


def test_a_member_holds_the_weights_after_its_last_update_whatever_comes_later(loop):
    events = [event for _ in range(60) for event in loop.step()]
    assert events == [*(Snapshot(k, 20 * k, 20 * k, SIXTY(19), k - 1) for k in (1, 2, 3)), Stop("finished")]
    assert counts(loop) == [(20, 20), (40, 40), (60, 60)]
    assert SnapshotStore(loop.recorder.directory).stopped == "finished"


def test_weights_are_copied_only_when_a_snapshot_is_due(loop):
    for _ in range(39):
        loop.step()
    loop.step(0)
    assert loop.captures == 1


def test_a_restart_is_handed_back_to_the_loop(tmp_path):
    with Recorder(tmp_path, program("star", lr=0.2, steps=60, cycles=3), framework="numpy") as recorder:
        loop = Loop(recorder)
        assert loop.step(20)[1:] == (Restart("first", "reset"),)
        loop.step(20)
        assert recorder.first_member()["updates"] == 20


def test_an_update_too_many_is_refused_and_nothing_is_taken(loop):
    with pytest.raises(ProtocolError, match="late='take'"):
        loop.step(21)
    assert loop.recorder.cursor.step == 0
    assert counts(loop) == []


def test_a_late_snapshot_is_warned_of_and_recorded_as_late(loop):
    with pytest.warns(CycleWarning, match="member 1 was due after update 20 and is taken 3 updates late") as caught:
        loop.step(23, late="take")
    assert [one.filename for one in caught] == [__file__]
    loop.step(17)
    assert counts(loop) == [(23, 23), (40, 40)]
    members = SnapshotStore(loop.recorder.directory).members
    assert [(m.step, m.due, m.lr, m.cycle) for m in members] == [(23, 20, SIXTY(22), 0), (40, 40, SIXTY(39), 1)]


def test_a_snapshot_on_time_is_not_warned_of_even_where_late_ones_are_allowed(loop):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.step(20, late="take")


def test_metrics_of_a_loop_are_recorded(loop):
    loop.step(20, metrics=lambda snapshot: {"index": snapshot.index, "loss": 0.5})
    loop.step(20, metrics=lambda snapshot: None)
    loop.recorder.close()
    found = [member.metrics for member in SnapshotStore(loop.recorder.directory).members]
    assert found == [{"index": 1.0, "loss": 0.5}, None]


def test_finish_takes_an_unfinished_member_and_says_why(loop):
    loop.step(20)
    loop.step(7)
    assert loop.finish("out of time") == (Snapshot(2, 27, 27, SIXTY(26), 1, unfinished=True), Stop("out of time"))
    assert loop.finish("again") == ()
    assert counts(loop) == [(20, 20), (27, 27)]
    store = SnapshotStore(loop.recorder.directory)
    assert ([member.unfinished for member in store.members], store.stopped) == ([False, True], "out of time")
    with pytest.raises(StoreError, match=r"a run that is out of time \(2 members\)"):
        Recorder(loop.recorder.directory, SIXTY, framework="numpy")


def test_leaving_the_block_early_takes_no_member(tmp_path):
    with Recorder(tmp_path, SIXTY, framework="numpy") as recorder:
        loop = Loop(recorder)
        loop.step(20)
        loop.step(19)
    assert counts(loop) == [(20, 20)]
    assert SnapshotStore(tmp_path).stopped is None


def test_an_error_of_the_loop_passes_through_and_keeps_the_members(tmp_path):
    def mine():
        with Recorder(tmp_path, SIXTY, framework="numpy") as recorder:
            Loop(recorder).step(20)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mine()
    assert [int(member["updates"]) for member in members_of(tmp_path)] == [20]


def test_closing_twice_is_closing_once(loop):
    loop.step(20)
    assert counts(loop) == counts(loop) == [(20, 20)]


# ------------------------------------------------------------------------------------------------ a disk that refuses


@pytest.fixture
def full_disk(loop, monkeypatch):
    def save(*args, **kwargs):
        raise StoreError("no space left")

    monkeypatch.setattr(loop.recorder.store, "save", save)
    return loop


def test_a_member_that_cannot_be_written_is_raised_at_a_later_update(full_disk):
    full_disk.step(20)
    for _ in range(10_000):
        try:
            full_disk.step(0)
        except StoreError as error:
            assert "no space left" in str(error)  # noqa: PT017  it comes when the writer's thread gets to it
            break
        time.sleep(0.001)
    else:
        pytest.fail("the writer's error was never raised")
    assert full_disk.recorder.cursor.step == 20


def test_a_member_that_cannot_be_written_is_raised_at_close_which_frees_the_directory(full_disk):
    full_disk.step(20)
    with pytest.raises(StoreError, match="no space left"):
        full_disk.recorder.close()
    SnapshotStore(full_disk.recorder.directory, "w").close()


def test_a_first_member_that_cannot_be_written_is_raised_to_who_wants_it(full_disk):
    full_disk.step(20)
    with pytest.raises(StoreError, match="no space left"):
        full_disk.recorder.first_member()


def test_a_run_whose_last_member_could_not_be_written_is_not_called_finished(loop, monkeypatch):
    loop.step(20)
    loop.step(20)
    loop.recorder.first_member()  # both are on disk

    def save(*args, **kwargs):
        raise StoreError("no space left")

    monkeypatch.setattr(loop.recorder.store, "save", save)
    loop.step(20)
    with pytest.raises(StoreError, match="no space left"):
        loop.recorder.close()
    store = SnapshotStore(loop.recorder.directory)
    assert (len(store.members), store.stopped) == (2, None)


# ------------------------------------------------------------------------------------------------ batches


class Loader(list):
    """A list that counts what is taken out of it."""

    taken = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.taken += 1
            yield batch


def test_batches_come_epoch_after_epoch_until_the_program_stops(loop):
    loader, seen = Loader(range(7)), []
    for batch in loop.recorder.batches(loader):
        seen.append(batch)
        loop.step()
    assert seen == [update % 7 for update in range(60)]
    assert loader.taken == 60  # none is asked for in vain
    assert counts(loop) == [(20, 20), (40, 40), (60, 60)]


def test_batches_end_where_the_program_and_an_epoch_end_together(loop):
    loader = Loader(range(20))
    for _ in loop.recorder.batches(loader):
        loop.step()
    assert loader.taken == 60


def test_several_micro_batches_may_make_an_update(loop):
    for place, _ in enumerate(loop.recorder.batches(range(10)), 1):
        if place % 4 == 0:
            loop.step()
    assert place == 240


def test_after_finish_there_are_no_more_batches(loop):
    seen = 0
    for _ in loop.recorder.batches(range(7)):
        seen += 1
        loop.step()
        if seen == 25:
            loop.finish("enough")
    assert seen == 25
    assert list(loop.recorder.batches(range(7))) == []


def test_a_loader_without_batches_is_refused(loop):
    with pytest.raises(ProtocolError, match="the loader gave no batch"):
        next(loop.recorder.batches([]))


def test_a_loader_that_can_be_walked_only_once_is_refused_in_the_second_epoch(loop):
    batches = loop.recorder.batches(iter(range(5)))
    for expected in range(5):
        assert next(batches) == expected
        loop.step()
    with pytest.raises(ProtocolError, match="can be walked again every epoch"):
        next(batches)


def test_an_epoch_without_an_update_is_refused(loop):
    with pytest.raises(ProtocolError, match=r"no update in 7 batches: call run\.step\(\)"):
        for _ in loop.recorder.batches(range(7)):
            pass


def test_a_sampler_that_shuffles_by_epoch_is_told_each_epoch(loop):
    told = []
    loader = Loader(range(25))
    loader.sampler = SimpleNamespace(set_epoch=told.append)
    for _ in loop.recorder.batches(loader):
        loop.step()
    assert told == [0, 1, 2]


def test_a_sampler_that_does_not_is_left_alone(loop):
    loader = Loader(range(30))
    loader.sampler = SimpleNamespace()
    assert sum(1 for _ in loop.recorder.batches(loader) if loop.step() or True) == 60


def test_an_error_in_describing_the_run_frees_the_directory(tmp_path, monkeypatch):
    def describe(self, **kwargs):
        raise StoreError("read-only")

    with monkeypatch.context() as patched:
        patched.setattr(SnapshotStore, "describe", describe)
        with pytest.raises(StoreError, match="read-only"):
            Recorder(tmp_path, SIXTY, framework="numpy")
    Recorder(Path(tmp_path), SIXTY, framework="numpy").close()
