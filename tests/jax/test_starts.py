"""What cannot work is refused before the first update, in one line; what is meant so is accepted."""

import functools
import logging
import os
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from snapcore import CosineCycles, DataError, DivergedError, ProtocolError, ScheduleError, StoreError
from snapcore.store import SnapshotStore
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
RATE = snapshot_schedule(CYCLES)
TX = optax.adam(RATE)


def make(**others):
    return {"w": jnp.ones((3, 2)), **others}


@jax.jit
def update(variables, state):
    updates, state = TX.update(jnp.cos(variables["w"]), state, variables["w"])
    return {**variables, "w": variables["w"] + updates}, state


def train(directory, variables, calls=12, after=lambda variables, done: variables, **options):
    state = TX.init(variables["w"])
    with SnapshotRun(directory, CYCLES, **options) as run:
        variables, state = run.start(variables, state)
        while run.updates < calls:
            variables, state = update(variables, state)
            variables = after(variables, run.updates)
            variables, state = run.step(variables, state)


def weights(directory):
    store = SnapshotStore(directory)
    return [store.load(member.index)["w"] for member in store.members]


NARROW = {
    "float8": (jnp.ones(3, jnp.float8_e4m3fn), "float8_e4m3fn"),
    "int4": (jnp.ones(4, jnp.int4), "int4"),
    "float8 on the host": (np.ones(3, ml_dtypes.float8_e5m2), "float8_e5m2"),
}


@pytest.mark.parametrize("where", ["variables", "rest"])
@pytest.mark.parametrize("name", NARROW)
def test_a_type_that_no_file_holds_is_refused_at_the_start_by_name(tmp_path, name, where):
    array, dtype = NARROW[name]
    variables = make(**({"scales": array} if where == "variables" else {}))
    rest = {"optimizer": TX.init(variables["w"]), **({"scales": array} if where == "rest" else {})}
    with (
        SnapshotRun(tmp_path / "run", CYCLES) as run,
        pytest.raises((StoreError, DataError), match=rf"scales.*{dtype}"),
    ):
        run.start(variables, rest)
    assert not SnapshotStore(tmp_path / "run").members


@pytest.mark.parametrize("thing", [object(), "name", lambda: 0, {1, 2}])
def test_an_object_that_is_no_array_is_refused_at_the_start_by_its_path(tmp_path, thing):
    refused = r"'rest/extra' of the tree is \w+: keep only what is trained or counted"
    with SnapshotRun(tmp_path / "run", CYCLES) as run, pytest.raises(DataError, match=refused):
        run.start(make(), {"optimizer": TX.init(make()["w"]), "extra": thing})


@pytest.mark.parametrize("bound", [jnp.array([jnp.inf]), jnp.array([[0.0, -jnp.inf]]), jnp.array([jnp.nan])])
def test_a_constant_that_is_not_finite_by_design_is_saved_as_it_is(tmp_path, bound):
    train(tmp_path / "run", make(bound=bound))
    store = SnapshotStore(tmp_path / "run")
    assert len(store.members) == 3
    np.testing.assert_array_equal(store.load(3)["bound"], bound)


def test_one_that_becomes_other_values_that_are_not_finite_is_refused(tmp_path):
    def spoil(variables, done):
        return {**variables, "bound": variables["bound"] * jnp.nan} if done == 6 else variables

    with pytest.raises(DivergedError, match="'bound'"):
        train(tmp_path / "run", make(bound=jnp.array([jnp.inf])), after=spoil)


def test_a_tree_under_jit_is_refused_at_the_start(tmp_path):
    refused = pytest.raises(ProtocolError, match="'variables/w' is being traced")
    with SnapshotRun(tmp_path / "run", CYCLES) as run, refused:
        jax.jit(lambda variables: run.start(variables, ()))(make())


def test_more_updates_than_optax_counts_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ScheduleError, match=r"steps must be below 2,147,483,648"):
        SnapshotRun(tmp_path / "run", CosineCycles(lr=0.1, steps=2**31, cycles=4))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("calls", [12, 6])
def test_the_directory_is_the_one_that_was_meant_when_the_run_was_made(tmp_path, monkeypatch, calls):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    state, variables = TX.init(make()["w"]), make()
    with SnapshotRun("runs/mine", CYCLES) as run:
        os.chdir("elsewhere")
        variables, state = run.start(variables, state)
        for _ in range(calls):
            variables, state = run.step(*update(variables, state))
    os.chdir(tmp_path)
    assert len(weights("runs/mine")) == calls // 4
    assert list((tmp_path / "elsewhere").iterdir()) == []
    if calls < 12:
        train(tmp_path / "runs/mine", make())
    assert len(weights("runs/mine")) == 3


@pytest.mark.parametrize("at", [4, 6, 9])
def test_after_a_control_c_the_run_resumes_from_the_update_it_came_in(tmp_path, at):
    train(tmp_path / "whole", make())

    def interrupt(variables, done):
        if done == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return variables

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", make(), after=interrupt)
    seen = []
    train(tmp_path / "run", make(), after=lambda variables, done: seen.append(done) or variables)
    assert seen == list(range(at, 12))
    np.testing.assert_array_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


INJECTED = functools.partial(optax.inject_hyperparams(optax.sgd), learning_rate=RATE)


def begin(directory, tx, leave_after=None):
    params, state = {"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)})
    with SnapshotRun(directory, CYCLES) as run:
        params, state = run.start(params, state)
        for _ in range(leave_after or 0):
            updates, state = tx.update(params, state, params)
            params, state = run.step(optax.apply_updates(params, updates), state)
    return state


def test_settings_that_differ_after_a_resume_are_said_and_the_saved_ones_are_in_force(tmp_path, caplog):
    begin(tmp_path / "run", INJECTED(momentum=0.9), leave_after=6)
    with caplog.at_level(logging.WARNING, "snapcore"):
        state = begin(tmp_path / "run", INJECTED(momentum=0.5))
    assert float(state.hyperparams["momentum"]) == pytest.approx(0.9)
    (said,) = [record.getMessage() for record in caplog.records if "settings differ" in record.getMessage()]
    assert "momentum 0.9 saved, 0.5 given, 0.9 in force" in said


def test_another_optimizer_is_refused_before_anything_is_touched(tmp_path):
    begin(tmp_path / "run", optax.adam(RATE), leave_after=6)
    point = next((tmp_path / "run" / "resume").iterdir()).read_bytes()
    for tx in (optax.sgd(RATE), optax.lion(RATE), optax.MultiSteps(optax.adam(RATE), 2)):
        with pytest.raises(StoreError, match=r"trained by ScaleByAdamState ScaleByScheduleState, got \w+"):
            begin(tmp_path / "run", tx)
    assert next((tmp_path / "run" / "resume").iterdir()).read_bytes() == point
    begin(tmp_path / "run", optax.adam(RATE))
