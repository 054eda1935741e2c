"""The rate that the updates were done with: found where it can be, asked for where it cannot, and recorded."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

from snapcore import CosineCycles, CycleWarning, ProtocolError
from snapcore.store import SnapshotStore
from snapcore_jax import schedule as schedule_module
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
OTHER = CosineCycles(lr=0.5, steps=40, cycles=2)
PARAMS = {"w": jnp.ones(3)}
inject = functools.partial(optax.inject_hyperparams, optax.sgd)


@pytest.fixture(autouse=True)
def no_schedule_was_asked(monkeypatch):
    """What other tests of this process have built is not known here."""
    monkeypatch.setattr(schedule_module, "ASKED", set())
    monkeypatch.setattr("snapcore_jax.run.ASKED", schedule_module.ASKED)


def train(directory, tx, *, calls=12, before=lambda step, state: state, finish=None, **options):
    """Train eagerly; return the rates recorded, and what was warned of."""
    params = PARAMS
    with warnings.catch_warnings(record=True) as caught, SnapshotRun(directory, CYCLES, **options) as run:
        warnings.simplefilter("always")
        params, state = run.start(params, tx.init(params))
        for step in range(calls):
            state = before(step, state)
            updates, state = tx.update(PARAMS, state, params)
            params, state = run.step(optax.apply_updates(params, updates), state)
        if finish:
            run.finish(finish)
    assert all(each.filename == __file__ and each.category is CycleWarning for each in caught)
    return [member.lr for member in SnapshotStore(directory).members], [str(each.message) for each in caught]


def set_by_hand(rates, step, state):
    state.hyperparams["learning_rate"] = jnp.asarray(rates(step))
    return state


OURS = {
    "built with it": lambda: {"tx": optax.sgd(snapshot_schedule(CYCLES))},
    "injected": lambda: {"tx": inject()(learning_rate=snapshot_schedule(CYCLES))},
    "injected in bfloat16": lambda: {
        "tx": inject(hyperparam_dtype=jnp.bfloat16)(learning_rate=snapshot_schedule(CYCLES))
    },
    "accumulating nothing": lambda: {"tx": optax.MultiSteps(inject()(learning_rate=snapshot_schedule(CYCLES)), 1)},
    "set by hand": lambda: {"tx": inject()(learning_rate=0.0), "before": functools.partial(set_by_hand, CYCLES)},
    "named": lambda: {"tx": optax.sgd(0.3), "rate": CYCLES},
    "a group at a tenth": lambda: {
        "tx": optax.multi_transform(
            {
                "head": inject()(learning_rate=snapshot_schedule(CYCLES)),
                "rest": inject()(learning_rate=lambda step: 0.1 * snapshot_schedule(CYCLES)(step)),
            },
            {"w": "head"},
        )
    },
}


@pytest.mark.parametrize("name", OURS)
def test_the_schedules_own_rates_are_recorded_and_nothing_is_said(tmp_path, name):
    rates, said = train(tmp_path / "run", **OURS[name]())
    assert (rates, said) == ([CYCLES(step - 1) for step in (4, 8, 12)], [])


COSINE = optax.cosine_decay_schedule(0.1, 12)
OTHERS = {
    "injected constant": (lambda: {"tx": inject()(learning_rate=0.3)}, lambda _: 0.3, "optax.inject_hyperparams"),
    "injected cosine": (lambda: {"tx": inject()(learning_rate=COSINE)}, COSINE, "optax.inject_hyperparams"),
    "set by hand": (
        lambda: {"tx": inject()(learning_rate=0.0), "before": functools.partial(set_by_hand, COSINE)},
        COSINE,
        "optax.inject_hyperparams",
    ),
    "another snapshot_schedule": (
        lambda: {"tx": optax.sgd(snapshot_schedule(OTHER))},
        OTHER,
        r"snapshot_schedule\(CosineCycles\(lr=0.5, steps=40",
    ),
    "a schedule that is named": (lambda: {"tx": optax.sgd(COSINE), "rate": COSINE}, COSINE, "passed as rate="),
    "a constant that is named": (lambda: {"tx": optax.sgd(0.3), "rate": 0.3}, lambda _: 0.3, "passed as rate="),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_rates_are_said_once_with_who_sets_them_and_are_what_members_record(tmp_path, name):
    options, used, who = OTHERS[name]
    rates, said = train(tmp_path / "run", **options())
    assert rates == pytest.approx([float(used(step - 1)) for step in (4, 8, 12)], rel=1e-6)
    assert len(said) == 1
    with pytest.warns(CycleWarning, match=rf"the schedule's is 0\.\d+: .*{who}"):
        warnings.warn(said[0], CycleWarning, stacklevel=1)


def test_an_unfinished_member_records_it_too(tmp_path):
    rates, said = train(tmp_path / "run", inject()(learning_rate=0.3), calls=6, finish="enough")
    assert (rates, len(said)) == (pytest.approx([0.3, 0.3]), 1)


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adam(0.1), optax.MultiSteps(optax.sgd(0.1), 1)])
def test_a_rate_that_cannot_be_seen_is_refused_at_the_first_step(tmp_path, tx):
    with pytest.raises(ProtocolError, match=r"does not ask for this run's rates: build it .*, or pass rate="):
        train(tmp_path / "run", tx)
    assert SnapshotStore(tmp_path / "run").members == ()


@pytest.mark.parametrize("rate", [0.1, CYCLES])
def test_a_rate_that_is_said_is_what_members_record(tmp_path, rate):
    rates, said = train(tmp_path / "run", optax.sgd(0.1), rate=rate)
    assert rates == pytest.approx([0.1] * 3 if rate == 0.1 else [CYCLES(step - 1) for step in (4, 8, 12)])
    assert len(said) == (rate == 0.1)


@pytest.mark.parametrize("rate", [COSINE, optax.join_schedules([COSINE, COSINE], [6]), optax.constant_schedule(0.1)])
def test_a_schedule_that_is_not_this_runs_is_refused_at_the_first_step(tmp_path, rate):
    with pytest.raises(ProtocolError, match=r"follows another schedule than this run's: build it .* or pass rate="):
        train(tmp_path / "run", optax.adam(rate))
    assert SnapshotStore(tmp_path / "run").members == ()


def test_a_schedule_that_was_only_plotted_has_not_been_followed(tmp_path):
    rate = snapshot_schedule(CYCLES)
    assert rate(jnp.arange(12)).shape == (12,)
    assert [rate(step) for step in range(12)] == [CYCLES(step) for step in range(12)]
    with pytest.raises(ProtocolError, match="does not ask for this run's rates"):
        train(tmp_path / "run", optax.sgd(0.1))


def test_of_a_compiled_update_the_trace_is_enough(tmp_path):
    tx = optax.sgd(snapshot_schedule(CYCLES))

    @jax.jit
    def update(params, state):
        updates, state = tx.update(PARAMS, state, params)
        return optax.apply_updates(params, updates), state

    for directory in ("one", "two"):  # the second traces nothing
        params, state = PARAMS, tx.init(PARAMS)
        with SnapshotRun(tmp_path / directory, CYCLES) as run:
            params, state = run.start(params, state)
            for _ in range(12):
                params, state = run.step(*update(params, state))
        assert run.finished


def test_without_the_optimizers_state_nothing_is_asked(tmp_path):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        for _ in range(12):
            run.step(PARAMS)
    assert run.finished
