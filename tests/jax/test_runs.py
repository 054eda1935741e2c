"""What counts as an update, how little is asked of the device for it, and how a run begins and ends."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from snapcore import CosineCycles, CycleWarning, ProtocolError, StoreError
from snapcore.store import SnapshotStore
from snapcore_jax import run as run_module
from snapcore_jax.counting import read_count
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
RATE = snapshot_schedule(CYCLES)
PARAMS = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}


@functools.partial(jax.jit, static_argnums=0)
def update(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def gradients(step=0, value=0.1):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value) * (step + 1), PARAMS)


def steps(directory):
    return [member.step for member in SnapshotStore(directory).members]


def walk(directory, tx, calls, grads=gradients, **options):
    """Call update and step so many times; return the run and its updates after each."""
    params, state, updates = PARAMS, tx.init(PARAMS), []
    with SnapshotRun(directory, CYCLES, **options) as run:
        params, state = run.start(params, state)
        for call in range(calls):
            params, state = run.step(*update(tx, params, state, grads(call)))
            updates.append(run.updates)
    return run, updates


COUNTING = {
    "sgd": optax.sgd(RATE, momentum=0.9),
    "adam, which counts twice": optax.adam(RATE),
    "adamw with a schedule of its decay": optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(RATE)
    ),
    "clipping before": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE)),
    "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=RATE),
    "injected before clipping": optax.chain(optax.inject_hyperparams(optax.adam)(learning_rate=RATE), optax.clip(1.0)),
    "two groups": optax.multi_transform({"a": optax.sgd(RATE), "b": optax.adam(RATE)}, {"b": "a", "w": "b"}),
    "if finite": optax.apply_if_finite(optax.adam(RATE), 100),
    "masked": optax.masked(optax.sgd(RATE), {"b": True, "w": False}),
}


@pytest.mark.parametrize("name", COUNTING)
def test_the_optimizers_own_count_is_found_whatever_it_is_wrapped_in(tmp_path, name):
    tx = COUNTING[name]
    state = tx.init(PARAMS)
    assert read_count(state) == 0
    _, state = update(tx, PARAMS, state, gradients())
    assert read_count((state, {"key": jax.random.key(0), "count": jnp.array(77)})) == 1
    run, updates = walk(tmp_path / "run", tx, 12)
    assert (updates, run.finished, steps(tmp_path / "run")) == (list(range(1, 13)), True, [4, 8, 12])


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9), optax.adam(0.1), optax.lion(0.1)])
def test_without_a_schedule_in_it_calls_count(tmp_path, tx):
    assert read_count(tx.init(PARAMS)) is None
    run, updates = walk(tmp_path / "run", tx, 12)
    assert (updates, run.finished, steps(tmp_path / "run")) == (list(range(1, 13)), True, [4, 8, 12])


@pytest.mark.parametrize("inner", [optax.sgd(RATE), optax.adam(RATE), optax.adam(0.1)])
def test_micro_batches_between_two_updates_do_not_count(tmp_path, inner):
    """Users ask for cycles that are right under gradient accumulation."""
    tx = optax.MultiSteps(inner, 4).gradient_transformation()
    run, updates = walk(tmp_path / "run", tx, 48)
    assert updates == [call // 4 for call in range(1, 49)]
    assert (run.finished, steps(tmp_path / "run")) == (True, [4, 8, 12])


def test_an_update_that_was_not_finite_and_left_out_does_not_count(tmp_path):
    tx = optax.apply_if_finite(optax.sgd(RATE), 100)
    _, updates = walk(tmp_path / "run", tx, 17, lambda call: gradients(value=jnp.nan if call % 2 else 0.1))
    assert updates == [call // 2 for call in range(2, 19)]
    assert steps(tmp_path / "run") == [4, 8]


def test_an_update_that_the_loop_itself_left_out_does_not_count(tmp_path):
    """A loss scaler chooses between the old state and the new, and leaves no other trace."""
    tx = optax.adam(RATE)
    params, state = PARAMS, tx.init(PARAMS)
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for call in range(15):
            new = update(tx, params, state, gradients())
            kept = call % 5 != 2
            params, state = run.step(*jax.tree.map(functools.partial(jnp.where, kept), new, (params, state)))
            assert run.updates == call + 1 - (call + 3) // 5
        assert run.finished
    assert steps(tmp_path / "run") == [4, 8, 12]


def test_the_count_is_read_only_when_the_end_of_a_cycle_may_be_reached(tmp_path, monkeypatch):
    """Reading waits for the update; a loop that reads at every one runs at the speed of the host."""
    reads = []
    monkeypatch.setattr(run_module, "read_count", lambda rest: reads.append(1) or read_count(rest))
    cycles = CosineCycles(lr=0.1, steps=300, cycles=3)
    tx = optax.sgd(snapshot_schedule(cycles))
    params, state = PARAMS, tx.init(PARAMS)
    with SnapshotRun(tmp_path / "run", cycles) as run:
        params, state = run.start(params, state)
        for _ in range(300):
            params, state = run.step(*update(tx, params, state, gradients()))
        assert run.finished
    assert len(reads) == 1 + 1 + 3  # at the start, after the first update, and at the end of each cycle


@pytest.mark.parametrize("together", [2, 4])
def test_several_updates_between_two_calls_all_count(tmp_path, together):
    """In JAX a loop of updates is often compiled as one."""
    tx = COUNTING["sgd"]
    params, state = PARAMS, tx.init(PARAMS)
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for done in range(together, 13, together):
            for _ in range(together):
                params, state = update(tx, params, state, gradients())
            params, state = run.step(params, state)
            assert run.updates == done
    assert steps(tmp_path / "run") == [4, 8, 12]


def test_a_late_call_is_warned_of_and_recorded_with_the_true_step(tmp_path):
    tx = COUNTING["sgd"]
    params, state = PARAMS, tx.init(PARAMS)
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for _ in range(3):
            params, state = run.step(*update(tx, params, state, gradients()))
        for _ in range(3):
            params, state = update(tx, params, state, gradients())
        told = "member 1 was due after update 4 and is taken 2 updates late"
        with pytest.warns(CycleWarning, match=told) as caught:
            run.step(params, state)
        assert caught[0].filename == __file__
    (member,) = SnapshotStore(tmp_path / "run").members
    assert (member.step, member.due, member.lr) == (6, 4, CYCLES(5))


def test_a_count_that_went_back_is_refused(tmp_path):
    def loop():
        tx = COUNTING["sgd"]
        params, state = PARAMS, tx.init(PARAMS)
        with SnapshotRun(tmp_path / "run", CYCLES) as run:
            for call in range(12):
                params, state = run.step(*update(tx, params, tx.init(PARAMS) if call == 6 else state, gradients()))

    with pytest.raises(ProtocolError, match=r"counts 2 updates, and had counted 4 before: .*keep the counts"):
        loop()
    assert steps(tmp_path / "run") == [4]


def test_an_optimizer_that_has_counted_before_is_warned_of_and_counts_from_there(tmp_path, caplog):
    tx = COUNTING["adam, which counts twice"]
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = update(tx, params, state, gradients())
    with caplog.at_level(logging.WARNING, "snapcore"), SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(params, state)
        for _ in range(12):
            params, state = run.step(*update(tx, params, state, gradients()))
    assert steps(tmp_path / "run") == [4, 8, 12]
    assert "has counted 5 updates that this run has not seen" in caplog.text


def test_the_rate_of_the_next_update_can_be_asked_for(tmp_path):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(PARAMS, COUNTING["sgd"].init(PARAMS))
        for step in range(11):
            assert run.lr == CYCLES(step)
            params, state = run.step(*update(COUNTING["sgd"], params, state, gradients()))


def test_an_update_after_the_end_is_refused(tmp_path):
    params = PARAMS
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for _ in range(12):
            params = run.step(params)
        with pytest.raises(ProtocolError, match="stopped after 12 updates"):
            run.step(params)
    assert steps(tmp_path / "run") == [4, 8, 12]


@pytest.mark.parametrize("tx", [COUNTING["sgd"], optax.sgd(0.1)])
@pytest.mark.parametrize("length", [1, 5, 30])
def test_batches_come_epoch_after_epoch_until_the_program_stops(tmp_path, tx, length):
    seen = []
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(PARAMS, tx.init(PARAMS))
        for batch in run.batches(range(length)):
            seen.append(batch)
            params, state = run.step(*update(tx, params, state, gradients()))
    assert seen == [place % length for place in range(12)]


def test_batches_of_a_loop_that_never_records_an_update_end_in_an_error(tmp_path):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        run.start(PARAMS)
        with pytest.raises(ProtocolError, match=r"no update in 2 batches: call run.step\(\)"):
            list(run.batches([1, 2]))


@pytest.mark.parametrize("tx", [COUNTING["sgd"], optax.sgd(0.1)])
def test_finishing_early_takes_an_unfinished_member(tmp_path, tx):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(PARAMS, tx.init(PARAMS))
        for _ in range(6):
            params, state = run.step(*update(tx, params, state, gradients()))
        run.finish("out of time")
        assert run.finished
    store = SnapshotStore(tmp_path / "run")
    assert [(member.step, member.unfinished) for member in store.members] == [(4, False), (6, True)]
    assert store.stopped == "out of time"
    np.testing.assert_array_equal(store.load(2)["w"], params["w"])


def test_finishing_at_the_end_of_a_cycle_takes_no_member_twice(tmp_path):
    """Torch-uncertainty counts the last epoch twice."""
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for _ in range(4):
            run.step(PARAMS)
        run.finish("enough")
    assert steps(tmp_path / "run") == [4]


def test_without_rest_members_are_taken_and_it_is_said_once_that_the_run_cannot_be_resumed(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "snapcore"), SnapshotRun(tmp_path / "run", CYCLES) as run:
        params = run.start(PARAMS)
        for _ in range(12):
            params = run.step(params)
    assert (params is PARAMS, steps(tmp_path / "run")) == (True, [4, 8, 12])
    assert [record.message.count("cannot be resumed; pass it as rest") for record in caplog.records] == [1]


def test_a_run_without_rest_that_was_left_is_not_opened_again(tmp_path):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for _ in range(6):
            run.step(PARAMS)
    with pytest.raises(StoreError, match=r"unfinished run without a resume point \(1 members\).*resume=False"):
        SnapshotRun(tmp_path / "run", CYCLES)


def test_rest_is_given_always_or_never(tmp_path):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(PARAMS, TX_STATE)
        with pytest.raises(ProtocolError, match=r"at every update and at run\.start, or never"):
            run.step(params)
        run.step(params, state)
    with SnapshotRun(tmp_path / "other", CYCLES) as run:
        params = run.start(PARAMS)
        with pytest.raises(ProtocolError, match="or never"):
            run.step(params, state)


TX_STATE = optax.sgd(0.1, momentum=0.9).init(PARAMS)


@pytest.mark.parametrize("begin", [lambda run: run.start(PARAMS, ()), lambda run: run.step(PARAMS, ())])
def test_start_is_called_once_and_first(tmp_path, begin):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        begin(run)
        with pytest.raises(ProtocolError, match=r"run.start is called once, before the first run.step"):
            run.start(PARAMS, ())


def test_a_finished_run_is_not_opened_again_unless_it_is_moved_aside(tmp_path):
    walk(tmp_path / "run", COUNTING["sgd"], 12)
    with pytest.raises(StoreError, match=r"holds a run that is finished.*SnapshotEnsemble.load.*resume=False"):
        SnapshotRun(tmp_path / "run", CYCLES)
    walk(tmp_path / "run", COUNTING["sgd"], 12, resume=False)
    assert steps(tmp_path / "run") == steps(tmp_path / "run.1") == [4, 8, 12]


def test_leaving_early_says_how_far_it_came_and_keeps_a_resume_point(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "snapcore"):
        walk(tmp_path / "run", COUNTING["sgd"], 7)
    assert "left after 7 of 12 updates; it resumes after update 7" in caplog.text


def test_leaving_between_an_update_and_its_step_goes_on_after_the_member_before(tmp_path, caplog):
    donating = jax.jit(lambda params, state: update(COUNTING["sgd"], params, state, gradients()), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    with caplog.at_level(logging.WARNING, "snapcore"), SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(params, COUNTING["sgd"].init(params))
        for _ in range(6):
            params, state = run.step(*donating(params, state))
        donating(params, state)
    assert "left after 6 of 12 updates; it resumes after update 4" in caplog.text
    assert run.updates == 6
    run.close()


@pytest.mark.parametrize("tx", [COUNTING["sgd"], optax.sgd(0.1)])
def test_an_exception_in_the_loop_keeps_the_members_frees_the_directory_and_says_how_far_it_came(tmp_path, tx, caplog):
    def interrupted_loop():
        with SnapshotRun(tmp_path / "run", CYCLES) as run:
            params, state = run.start(PARAMS, tx.init(PARAMS))
            for _ in range(6):
                params, state = run.step(*update(tx, params, state, gradients()))
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING, "snapcore"), pytest.raises(KeyboardInterrupt):
        interrupted_loop()
    assert "left after 6 of 12 updates; it resumes after update 4" in caplog.text
    with SnapshotStore(tmp_path / "run", "w") as store:
        assert ([member.step for member in store.members], store.stopped) == ([4], None)


@pytest.mark.parametrize("tx", [COUNTING["sgd"], optax.sgd(0.1)])
def test_closing_a_run_again_that_an_exception_in_the_loop_has_closed_does_nothing(tmp_path, tx, caplog):
    run = SnapshotRun(tmp_path / "run", CYCLES)

    def interrupted_loop():
        with run:
            params, state = run.start(PARAMS, tx.init(PARAMS))
            for _ in range(6):
                params, state = run.step(*update(tx, params, state, gradients()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_loop()
    run.close()
    run.close()
    assert (run.updates, run.lr, run.finished) == (6, CYCLES(6), False)
    assert caplog.text.count("left after") == 1
    assert steps(tmp_path / "run") == [4]


@pytest.mark.parametrize("tx", [COUNTING["sgd"], optax.sgd(0.1)])
def test_updates_after_the_end_are_not_the_runs(tmp_path, tx):
    params, state = PARAMS, tx.init(PARAMS)
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for _ in range(5):
            params, state = run.step(*update(tx, params, state, gradients()))
        run.finish("enough")
        with pytest.raises(ProtocolError, match="stopped after 5 updates"):
            run.step(*update(tx, params, state, gradients()))
        assert run.updates == 5
    assert run.updates == 5
