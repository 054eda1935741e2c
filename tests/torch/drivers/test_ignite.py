"""Ignite's engine: its scheduler handler counts by itself, and a run is one more handler."""

import warnings

import pytest
from torch import nn

from snapcore_torch import SnapshotLR, SnapshotRun

from .training import SIXTY, assert_members, examples, network, plain_loop, sgd, steps

with warnings.catch_warnings():  # PyTorch warns of a part of its own that Ignite imports
    warnings.simplefilter("ignore", DeprecationWarning)
    from ignite.engine import Engine, Events
    from ignite.handlers.param_scheduler import LRScheduler

BATCHES = list(zip(*(part.split(6) for part in examples()), strict=True))


@pytest.fixture
def trained():
    """A model, its optimizer, an engine that trains it, and the rates of its updates."""
    model, rates = network(), []
    optimizer = sgd(model)

    def update(engine, batch):
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, Engine(update), rates


def test_ignites_handler_gives_every_update_its_rate(trained):
    """It never calls `step`: it raises `last_epoch` and asks for the rate."""
    _, optimizer, engine, rates = trained
    engine.add_event_handler(Events.ITERATION_STARTED, LRScheduler(SnapshotLR(optimizer, SIXTY)))
    engine.run(BATCHES, max_epochs=6)
    assert rates == [SIXTY(step) for step in range(60)]


def test_a_handler_that_steps_the_scheduler_after_each_update_does_the_same(trained):
    _, optimizer, engine, rates = trained
    scheduler = SnapshotLR(optimizer, SIXTY)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: scheduler.step())
    engine.run(BATCHES, max_epochs=6)
    assert rates == [SIXTY(step) for step in range(60)]


def test_a_run_in_an_engine_takes_its_members_and_sets_the_rate(trained, tmp_path):
    model, optimizer, engine, rates = trained
    with SnapshotRun(tmp_path, SIXTY, model, optimizer) as run:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: run.step())
        engine.run(BATCHES, max_epochs=6)
        assert run.finished
    assert steps(tmp_path) == [20, 40, 60]
    assert_members(tmp_path, plain_loop())
    assert rates == [SIXTY(step) for step in range(60)]


def test_every_second_iteration_may_be_asked_for_the_run_if_the_members_fall_on_it(trained, tmp_path):
    """The optimizer's own updates count, not the handler's calls."""
    model, optimizer, engine, _ = trained
    with SnapshotRun(tmp_path, SIXTY, model, optimizer) as run:
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda engine: run.step())
        engine.run(BATCHES, max_epochs=6)
    assert steps(tmp_path) == [20, 40, 60]


def test_a_run_stopped_in_an_engine_resumes_in_another(trained, tmp_path):
    """The run's own batches bring the order of the data back; the engine need not know of it."""
    model, optimizer, engine, _ = trained

    def drive(engine, run, until):
        def record(engine):
            run.step()
            if run.updates == until:
                engine.terminate()

        engine.add_event_handler(Events.ITERATION_COMPLETED, record)
        engine.run(run.batches(BATCHES), max_epochs=1, epoch_length=60 - run.updates)

    with SnapshotRun(tmp_path, SIXTY, model, optimizer) as run:
        drive(engine, run, until=33)
    again = network()
    new = sgd(again)

    def update(engine, batch):
        nn.functional.cross_entropy(again(batch[0]), batch[1]).backward()
        new.step()
        new.zero_grad()

    with SnapshotRun(tmp_path, SIXTY, again, new) as run:
        drive(Engine(update), run, until=60)
    assert_members(tmp_path, plain_loop())
