"""Killed after any update and started again, a run gives bit for bit the members of one that was never stopped."""

import functools
import importlib.util
import signal
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapcore import DataError
from snapcore.store import SnapshotStore
from snapcore_tensorflow.run import SnapshotRun
from snapcore_tensorflow.schedule import SnapshotSchedule

from ..forked import Forked

SCRIPT = Path(__file__).with_name("killed_loop.py")
spec = importlib.util.spec_from_file_location("killed_loop", SCRIPT)
killed_loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(killed_loop)
CYCLES, train = killed_loop.CYCLES, killed_loop.train


class Killed(Exception):  # noqa: N818  it is no error
    """Stands for the end of the process: nothing that the run does after an exception makes it resumable."""


def optimizer(name):
    rate = functools.partial(SnapshotSchedule, CYCLES)
    return {
        "adam": lambda: keras.optimizers.Adam(rate()),
        "plain": lambda: keras.optimizers.SGD(0.7, momentum=0.9),
        "accumulating": lambda: keras.optimizers.Adam(
            rate(gradient_accumulation_steps=3), gradient_accumulation_steps=3
        ),
        "plain and accumulating": lambda: keras.optimizers.Adam(0.7, gradient_accumulation_steps=3),
        "scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.7), dynamic_growth_steps=3),
    }[name]()


@functools.cache
def training(name="adam"):
    return killed_loop.Training(optimizer(name))


def contents(directory):
    store = SnapshotStore(directory)
    assert store.stopped == "finished"
    return {
        member.step: {name: array.tobytes() for name, array in store.load(member.index).items()}
        for member in store.members
    }


def killed_at(number):
    def end(call):
        if call == number:
            raise Killed

    return end


def train_whole(directory, name="adam", *arguments, **options):
    loop = training(name)
    np.random.seed(0)
    return train(directory, loop, *arguments, **options)


@pytest.mark.parametrize(
    ("name", "numbers", "every", "calls"),
    [
        ("adam", range(1, 12), None, 12),
        ("adam", (1, 3, 4, 7, 10), 3, 12),
        ("plain", (1, 4, 7, 11), 1, 12),
        ("accumulating", (1, 7, 13, 23, 35), 2, 36),
        ("plain and accumulating", (5, 20), 2, 36),
        ("scaling", (3, 8, 10), 1, 12),
    ],
)
def test_killed_after_any_call_and_started_again_the_members_are_the_same_bits(tmp_path, name, numbers, every, calls):
    """Nobody else can go on with a run exactly: the users who ask are told to start again."""
    assert train_whole(tmp_path / "whole", name) == calls
    for number in numbers:
        directory = tmp_path / str(number)
        with pytest.raises(Killed):
            train_whole(directory, name, after_call=killed_at(number), resume_every=every)
        np.random.seed(number if (directory / "resume").exists() else 0)  # as another process would
        train(directory, training(name), resume_every=every)
        assert contents(directory) == contents(tmp_path / "whole"), number


@pytest.mark.parametrize("place", ["before the update", "before the call", "after the call"])
@pytest.mark.parametrize("number", [7, 8])
def test_a_run_left_early_goes_on_from_that_very_update_and_batch(tmp_path, place, number):
    train_whole(tmp_path / "whole")
    loop = training()
    loop.begin()
    np.random.seed(0)
    with SnapshotRun(tmp_path / "run", CYCLES, loop.model, loop.optimizer) as run:
        for x in run.batches(killed_loop.Shuffled()):
            if place == "before the update" and run.updates == number:
                break
            loop.update(x)
            if place == "before the call" and run.updates == number:
                break
            run.step()
            if place == "after the call" and run.updates == number:
                break
    np.random.seed(99)
    assert train(tmp_path / "run", loop) == 12 - number
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_run_left_between_micro_batches_goes_on_with_the_next(tmp_path):
    train_whole(tmp_path / "whole", "accumulating")
    loop = training("accumulating")
    loop.begin()
    np.random.seed(0)
    with SnapshotRun(tmp_path / "run", CYCLES, loop.model, loop.optimizer) as run:
        for call, x in enumerate(run.batches(killed_loop.Shuffled()), 1):
            loop.update(x)
            run.step()
            if call == 20:
                break
    np.random.seed(99)
    assert train(tmp_path / "run", loop) == 16
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


DATA = np.stack([np.roll(killed_loop.X, place) for place in range(5)])
PIPELINES = {
    "in its order": lambda: tf.data.Dataset.from_tensor_slices(DATA),
    "shuffled with a seed": lambda: tf.data.Dataset.from_tensor_slices(DATA).shuffle(5, seed=3).prefetch(1),
}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("number", [3, 5, 11])
def test_a_dataset_of_tensorflow_goes_on_in_its_epoch(tmp_path, name, number):
    pipeline = PIPELINES[name]
    training()  # once made, it changes TensorFlow's own seed no more, which a seed of the data is added to
    train_whole(tmp_path / "whole", "adam", CYCLES, pipeline())
    with pytest.raises(Killed):
        train_whole(tmp_path / "run", "adam", CYCLES, pipeline(), after_call=killed_at(number), resume_every=1)
    assert train(tmp_path / "run", training(), CYCLES, pipeline()) == 12 - number
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_process_that_is_really_killed_goes_on_in_another(tmp_path, name):
    def start(directory, *arguments):
        log = tmp_path / f"{directory} {len(arguments)}"
        return Forked(SCRIPT, tmp_path / directory, *arguments, log=log, strict=True, OMP_NUM_THREADS="1")

    ended = start("run", "10", name)
    assert ended.wait() == (-signal.SIGKILL if name == "SIGKILL" else 143), ended.errors
    done = start("run")
    assert done.wait() == 0, done.errors
    killed_loop.main(tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def leave(directory):
    """Leave a run after its first member."""
    with pytest.raises(Killed):
        train_whole(directory, after_call=killed_at(5))


def test_another_optimizer_or_model_than_before_is_refused_by_name_and_left_as_it_was(tmp_path):
    leave(tmp_path / "run")
    model = killed_loop.make_model()
    with pytest.raises(DataError, match=r"the resume point does not fit the model .*optimizer/"):
        SnapshotRun(tmp_path / "run", CYCLES, model, keras.optimizers.SGD(SnapshotSchedule(CYCLES)))
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="other")])
    before = [weight.tolist() for weight in other.get_weights()]
    with pytest.raises(DataError, match=r"the resume point does not fit the model .*\(\d+ differences\)"):
        SnapshotRun(tmp_path / "run", CYCLES, other, optimizer("adam"))
    assert [weight.tolist() for weight in other.get_weights()] == before
    assert train(tmp_path / "run", training()) == 8
