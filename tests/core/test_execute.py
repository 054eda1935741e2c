"""A managed run: what lands in its directory, against a simulation without cursor or store."""

import itertools
import tempfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import CosineCycles, DivergedError, Program, Restart, StoreError, program
from snapcore.store import SnapshotStore

from .training import RESTARTS, SIXTY, NumpyBackend, assert_same, managed, members_of, simulate, weights_of


def test_a_managed_run_records_each_member_with_its_position_and_rate(tmp_path):
    plan = program("snapshot", lr=0.2, steps=60, cycles=3)
    state = managed(tmp_path / "run", plan, seed=5)
    store = SnapshotStore(tmp_path / "run")
    found = [(m.index, m.step, m.due, m.cycle, m.lr, m.framework, m.unfinished, m.metrics) for m in store.members]
    lr = plan.schedule(19)
    assert found == [(k, 20 * k, 20 * k, k - 1, lr, "numpy", False, None) for k in (1, 2, 3)]
    assert (store.program, store.stopped) == (plan.to_dict(), "finished")
    assert_same(members_of(tmp_path / "run"), simulate(plan, 5))
    assert state.weights["updates"] == 60


def test_a_finished_run_leaves_nothing_but_its_members_and_its_manifest(tmp_path):
    managed(tmp_path, resume_every=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "snapcore.json",
        *(f"snapshot-00{k}.safetensors" for k in (1, 2, 3)),
    ]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 5),
    st.sampled_from(["paper", "even"]),
    st.sampled_from(RESTARTS),
    st.integers(0, 99),
    st.sampled_from([None, 1, 4]),
)
def test_the_members_of_any_program_are_those_of_a_plain_loop(steps, cycles, remainder, between, seed, every):
    plan = Program("mine", CosineCycles(0.1, steps, min(cycles, steps), remainder=remainder), between)
    with tempfile.TemporaryDirectory() as directory:
        managed(directory, plan, seed=seed, resume_every=every)
        assert_same(members_of(directory), simulate(plan, seed))


def test_each_train_is_one_call_of_the_native_loop(tmp_path):
    backend = NumpyBackend()
    managed(tmp_path, backend=backend)
    assert backend.log == [("init", "quadratic", 1), ("train", 0, 20), ("train", 20, 40), ("train", 40, 60)]


def test_the_native_loop_comes_back_for_every_resume_point(tmp_path):
    backend = NumpyBackend()
    managed(tmp_path, backend=backend, resume_every=8)
    positions = [0, 8, 16, 20, 24, 32, 40, 48, 56, 60]
    assert backend.log[1:] == [("train", *position) for position in itertools.pairwise(positions)]


def calls_that_take(seconds, monkeypatch, directory):
    """The lengths of the native loop's calls where each of them takes so long by the clock."""
    now = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(now) * seconds)
    backend = NumpyBackend()
    managed(directory, Program("one", CosineCycles(0.1, 2000, 1)), backend)
    return [entry[2] - entry[1] for entry in backend.log if entry[0] == "train"]


def test_the_calls_of_a_fast_loop_become_longer(tmp_path, monkeypatch):
    assert calls_that_take(0.1, monkeypatch, tmp_path) == [50, 100, 200, 400, 800, 450]


def test_the_calls_of_a_loop_at_the_right_pace_stay_as_they_are(tmp_path, monkeypatch):
    assert calls_that_take(1.0, monkeypatch, tmp_path) == [50] * 40


def test_the_calls_of_a_loop_that_slows_down_become_shorter(tmp_path, monkeypatch):
    times = iter([0, 0.1, 0.2, 5.2, 10.2, *range(11, 99)])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    backend = NumpyBackend()
    managed(tmp_path, Program("one", CosineCycles(0.1, 600, 1)), backend)
    assert [entry[2] - entry[1] for entry in backend.log if entry[0] == "train"] == [50, 100, 200, 100, 50, 50, 50]


def test_a_restart_from_the_first_member_brings_its_weights_and_fresh_moments(tmp_path):
    backend = NumpyBackend()
    managed(tmp_path, program("star", lr=0.2, steps=60, cycles=3), backend)
    first = SnapshotStore(tmp_path).load(1)["w"].tolist()
    assert [entry for entry in backend.log if entry[0] == "restore"] == [("restore", first, "reset")] * 2


def test_a_fresh_restart_asks_for_the_weights_of_the_next_member(tmp_path):
    backend = NumpyBackend()
    managed(tmp_path, program("singlecycle", lr=0.2, steps=60, cycles=3), backend, seed=9)
    assert [entry[2] for entry in backend.log if entry[0] == "init"] == [1, 2, 3]
    expected = [("restore", weights_of(9, member)["w"].tolist(), "reset") for member in (2, 3)]
    assert [entry for entry in backend.log if entry[0] == "restore"] == expected


def test_a_restart_from_the_previous_weights_leaves_them_to_the_backend(tmp_path):
    backend = NumpyBackend()
    managed(tmp_path, Program("mine", SIXTY, Restart("previous", "reset")), backend)
    assert [entry for entry in backend.log if entry[0] == "restore"] == [("restore", None, "reset")] * 2


def test_equal_seeds_give_equal_members_and_others_do_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        managed(tmp_path / name, seed=seed)
    a, b, c = (members_of(tmp_path / name) for name in "abc")
    assert_same(a, b)
    assert a[0]["w"].tolist() != c[0]["w"].tolist()


def test_options_go_to_the_backend(tmp_path):
    state = managed(tmp_path, program("single", lr=1e-9, steps=1, cycles=1), scale=0.0)
    assert state.weights["w"] == pytest.approx([0, 0, 0], abs=1e-8)


def test_every_loss_is_reported(tmp_path):
    heard = []
    managed(tmp_path, backend=NumpyBackend(lambda step: step / 2), report=lambda *args: heard.append(args))
    assert heard == [(step, step / 2) for step in range(1, 61)]


def test_metrics_are_recorded_with_the_member_they_are_of(tmp_path):
    managed(tmp_path, metrics=lambda snapshot, state: {"w0": state.weights["w"][0], "index": snapshot.index})
    store = SnapshotStore(tmp_path)
    expected = [{"w0": float(store.load(k)["w"][0]), "index": k} for k in (1, 2, 3)]
    assert [member.metrics for member in store.members] == expected


# ------------------------------------------------------------------------------------------------ divergence


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_members_before(tmp_path, bad):
    backend, heard = NumpyBackend(lambda step: bad if step == 45 else 1.0), []
    with pytest.raises(DivergedError, match=f"the loss of update 45 is {bad}; the members taken before are kept"):
        managed(tmp_path, backend=backend, report=lambda *args: heard.append(args))
    assert len(heard) == 44
    assert_same(members_of(tmp_path), simulate(Program("it", SIXTY), 0)[:2])
    assert SnapshotStore(tmp_path).stopped is None


def test_weights_that_are_not_finite_become_no_member_and_the_ones_before_are_kept(tmp_path):
    with pytest.raises(DivergedError, match="member 2 at update 40 is refused: 1 of 3 values of 'w' are not finite"):
        managed(tmp_path, backend=NumpyBackend(spoil=39))
    assert_same(members_of(tmp_path), simulate(Program("it", SIXTY), 0)[:1])
    assert SnapshotStore(tmp_path).stopped is None


def test_weights_that_are_not_finite_become_no_resume_point_and_the_one_before_is_kept(tmp_path):
    with pytest.raises(DivergedError, match="the resume point at update 30 is refused: 1 of 3 values of 'w'"):
        managed(tmp_path, backend=NumpyBackend(spoil=29), resume_every=5)
    backend = NumpyBackend()
    managed(tmp_path, backend=backend)
    assert next(entry for entry in backend.log if entry[0] == "train") == ("train", 25, 40)
    assert_same(members_of(tmp_path), simulate(Program("it", SIXTY), 0))


def test_weights_spoilt_in_the_last_cycle_leave_the_run_unfinished(tmp_path):
    with pytest.raises(DivergedError, match="member 3 at update 60"):
        managed(tmp_path, backend=NumpyBackend(spoil=59))
    store = SnapshotStore(tmp_path)
    assert ([member.index for member in store.members], store.stopped) == ([1, 2], None)


# ------------------------------------------------------------------------------------------------ opening a directory


def test_a_finished_run_opened_again_is_refused_before_anything_is_built(tmp_path):
    managed(tmp_path)
    before, backend = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()), NumpyBackend()
    with pytest.raises(StoreError, match=r"holds a run that is finished \(3 members\): load it with") as caught:
        managed(tmp_path, backend=backend)
    assert "choose another directory" in str(caught.value)
    assert "resume=False" in str(caught.value)
    assert backend.log == []
    after = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    assert [entry for entry in after if entry[0] != ".lock"] == [entry for entry in before if entry[0] != ".lock"]
    SnapshotStore(tmp_path, "w").close()  # the refusal freed the lock


def test_an_old_run_can_be_moved_aside(tmp_path):
    managed(tmp_path / "run", seed=1)
    managed(tmp_path / "run", seed=2, resume=False)
    managed(tmp_path / "run", seed=3, resume=False)
    for name, seed in (("run.1", 1), ("run.2", 2), ("run", 3)):
        assert_same(members_of(tmp_path / name), simulate(Program("it", SIXTY), seed))


def test_where_there_is_no_run_nothing_is_moved_aside(tmp_path):
    managed(tmp_path / "run", resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
