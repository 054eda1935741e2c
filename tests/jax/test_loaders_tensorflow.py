"""A `tf.data.Dataset` in a JAX loop: what it shuffles is drawn again, or refused before the first batch."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf

from snapcore import CosineCycles, ProtocolError
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=24, cycles=3)  # three epochs of eight batches
TX = optax.sgd(snapshot_schedule(CYCLES))


class Killed(Exception):  # noqa: N818  it is no error
    """Stands for the end of the process."""


class AsNumpy:
    """What tfds.as_numpy gives: an object around the data set."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return self.dataset.as_numpy_iterator()


class AsNumpyOfTfds(AsNumpy):
    """The same, by where its class says that it comes from."""

    __module__ = "tensorflow_datasets.core.dataset_utils"


class Bound:
    """One that holds the data set in a function's bound arguments."""

    def __init__(self, dataset):
        self.make = functools.partial(iter, dataset)

    def __iter__(self):
        return self.make()


def shuffled(**options):
    return tf.data.Dataset.range(32).shuffle(32, **options).map(lambda number: number * 2).batch(4)


def zipped():
    return tf.data.Dataset.zip((shuffled(seed=1), shuffled(seed=2)))


def train(directory, loader, kill=None, **options):
    params, state, seen = jnp.zeros(()), TX.init(jnp.zeros(())), []
    try:
        with SnapshotRun(directory, CYCLES, resume_every=4, **options) as run:
            params, state = run.start(params, state)
            for batch in run.batches(loader):
                seen.append(np.asarray(batch).tolist())
                updates, state = TX.update(params, state)
                params, state = run.step(params + updates, state)
                if run.updates == kill:
                    run._recorder.position()
                    raise Killed
    except Killed:
        pass
    return seen


MADE = {
    "itself": lambda: shuffled(seed=3),
    "as numpy": lambda: AsNumpy(shuffled(seed=3)),
    "as numpy by tfds": lambda: AsNumpyOfTfds(shuffled(seed=3)),
    "in a partial": lambda: Bound(shuffled(seed=3)),
    "two together": zipped,
    "the same order always": lambda: shuffled(seed=3, reshuffle_each_iteration=False),
}


@pytest.mark.exhaustive(keep=4)
@pytest.mark.parametrize("kill", [5, 13, 21])
@pytest.mark.parametrize("name", MADE)
def test_made_anew_it_gives_the_batches_of_a_run_that_was_not_stopped(tmp_path, name, kill):
    whole = train(tmp_path / "whole", MADE[name]())
    train(tmp_path / "run", MADE[name](), kill)
    assert train(tmp_path / "run", MADE[name]()) == whole[kill - kill % 4 :]


def test_one_that_another_run_has_walked_before_is_counted_from_there(tmp_path):
    def second(kill=None):
        dataset = shuffled(seed=4)
        first = train(tmp_path / f"first {kill}", dataset)
        return first, train(tmp_path / f"second {kill}", dataset, kill)

    first, whole = second()
    assert first != whole
    second(13)
    assert train(tmp_path / "second 13", shuffled(seed=4)) == whole[12:]


def test_one_that_cannot_go_back_is_refused_before_the_first_batch(tmp_path):
    dataset = shuffled(seed=3)
    train(tmp_path / "run", dataset, 13)
    with pytest.raises(ProtocolError, match=r"walked before in this process, .* make it anew"):
        train(tmp_path / "run", dataset)


@pytest.mark.parametrize("wrapped", [lambda dataset: dataset, AsNumpy, lambda dataset: dataset.prefetch(2)])
def test_without_a_seed_it_is_refused_before_the_first_batch(tmp_path, wrapped):
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        run.start(jnp.zeros(()), TX.init(jnp.zeros(())))
        with pytest.raises(
            ProtocolError, match=r"shuffled without a seed, .* call shuffle\(…, seed=0\), or tf\.random"
        ):
            run.batches(wrapped(shuffled()))
    with SnapshotRun(tmp_path / "other", CYCLES) as run:  # a run that cannot be resumed has no order to keep
        run.start(jnp.zeros(()))
        assert len(next(run.batches(shuffled()))) == 4


def test_a_seed_of_the_program_will_do(tmp_path):
    tf.random.set_seed(5)
    assert len(train(tmp_path / "run", shuffled())) == 24
