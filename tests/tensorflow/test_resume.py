"""Killed after any update and started again, a run gives bit for bit the members of one that was never stopped."""

import functools
import importlib.util
import os
import signal
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapcore import DataError, ProtocolError, StoreError
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


@pytest.mark.exhaustive(keep=2)
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
    """Nobody else can resume a run exactly: the users who ask are referred to a new start."""
    assert train_whole(tmp_path / "whole", name) == calls
    for number in numbers:
        directory = tmp_path / str(number)
        with pytest.raises(Killed):
            train_whole(directory, name, after_call=killed_at(number), resume_every=every)
        np.random.seed(number if (directory / "resume").exists() else 0)  # as another process would
        train(directory, training(name), resume_every=every)
        assert contents(directory) == contents(tmp_path / "whole"), number


@pytest.mark.parametrize("moment", ["before the update", "before the call", "after the call"])
@pytest.mark.parametrize("number", [7, 8])
def test_a_run_left_early_resumes_from_that_very_update_and_batch(tmp_path, moment, number):
    train_whole(tmp_path / "whole")
    loop = training()
    loop.begin()
    np.random.seed(0)
    with SnapshotRun(tmp_path / "run", CYCLES, loop.model, loop.optimizer) as run:
        for x in run.batches(killed_loop.Shuffled()):
            if moment == "before the update" and run.updates == number:
                break
            loop.update(x)
            if moment == "before the call" and run.updates == number:
                break
            run.step()
            if moment == "after the call" and run.updates == number:
                break
    np.random.seed(99)
    assert train(tmp_path / "run", loop) == 12 - number
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_run_left_between_micro_batches_resumes_with_the_next(tmp_path):
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


DATA = np.stack([np.roll(killed_loop.X, index) for index in range(5)])
PIPELINES = {
    "in its order": lambda: tf.data.Dataset.from_tensor_slices(DATA),
    "shuffled with a seed": lambda: tf.data.Dataset.from_tensor_slices(DATA).shuffle(5, seed=3).prefetch(1),
}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("number", [3, 5, 11])
def test_a_dataset_of_tensorflow_resumes_in_its_epoch(tmp_path, name, number):
    pipeline = PIPELINES[name]
    training()  # once made, it changes TensorFlow's own seed no more, which a seed of the data is added to
    train_whole(tmp_path / "whole", "adam", CYCLES, pipeline())
    with pytest.raises(Killed):
        train_whole(tmp_path / "run", "adam", CYCLES, pipeline(), after_call=killed_at(number), resume_every=1)
    assert train(tmp_path / "run", training(), CYCLES, pipeline()) == 12 - number
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


class Held:
    """A loader that holds a data set."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __iter__(self):
        return iter(self._dataset)


def shuffled():
    return tf.data.Dataset.from_tensor_slices(DATA).shuffle(5, seed=3)


def distributed():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    return strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(DATA).shuffle(5, seed=3))


@pytest.mark.exhaustive(keep=3)
@pytest.mark.parametrize("number", [3, 7, 10])
@pytest.mark.parametrize("make", [distributed, lambda: Held(shuffled()), lambda: shuffled().repeat(2).take(7)])
def test_the_seeds_of_distributed_and_of_held_data_sets_are_drawn_again(tmp_path, make, number):
    training()
    train_whole(tmp_path / "whole", "adam", CYCLES, make())
    with pytest.raises(Killed):
        train_whole(tmp_path / "run", "adam", CYCLES, make(), after_call=killed_at(number), resume_every=1)
    assert train(tmp_path / "run", training(), CYCLES, make()) == 12 - number
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_data_set_that_was_walked_before_the_run_is_resumed_as_it_was(tmp_path):
    training()
    walked = []
    for _ in range(2):
        data = shuffled()
        with pytest.raises(Killed):
            train_whole(tmp_path / f"before {len(walked)}", "adam", CYCLES, data, after_call=killed_at(6))
        walked.append(data)
    train_whole(tmp_path / "whole", "adam", CYCLES, walked[0])  # from the third epoch of the data set on
    with pytest.raises(Killed):
        train_whole(tmp_path / "run", "adam", CYCLES, walked[1], after_call=killed_at(7), resume_every=1)
    assert train(tmp_path / "run", training(), CYCLES, shuffled()) == 5
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_data_set_that_has_drawn_further_is_refused_before_its_first_batch_and_an_unshuffled_one_is_not(tmp_path):
    training()
    for name, data in (("shuffled", shuffled()), ("plain", tf.data.Dataset.from_tensor_slices(DATA))):
        with pytest.raises(Killed):
            train_whole(tmp_path / name, "adam", CYCLES, data, after_call=killed_at(7), resume_every=1)
        if name == "plain":
            assert train(tmp_path / name, training(), CYCLES, data) == 5
            continue
        with pytest.raises(ProtocolError, match=r"was walked before in this process.*: make it anew to resume"):
            train(tmp_path / name, training(), CYCLES, data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.data.Dataset.from_tensor_slices(DATA).shuffle(5),
        lambda: tf.data.Dataset.from_tensor_slices(DATA).shuffle(5).map(lambda x: x).prefetch(1),
        lambda: Held(tf.data.Dataset.zip(tf.data.Dataset.from_tensor_slices(DATA).shuffle(5))),
    ],
)
@pytest.mark.parametrize("way", ["batches", "epochs"])
def test_a_data_set_shuffled_without_a_seed_is_refused_before_its_first_batch(tmp_path, make, way, monkeypatch):
    loop = training()
    loop.begin()
    monkeypatch.setattr(tf.random, "set_seed", tf.random.set_seed)
    tf.random.set_seed(None)
    try:
        with SnapshotRun(tmp_path / "run", CYCLES, loop.model, loop.optimizer) as run:
            with pytest.raises(ProtocolError, match=r"shuffled without a seed.*call shuffle\(…, seed=0\)"):
                getattr(run, way)(make())
            assert run.updates == 0
    finally:
        tf.random.set_seed(5)


def walk_epochs(directory, killed=None):
    """Return what a loop over epochs does: each update, and an evaluation at the end of every epoch."""
    seen, loop = [], training()
    loop.begin()
    with SnapshotRun(directory, CYCLES, loop.model, loop.optimizer, resume_every=1) as run:
        for epoch, batches in run.epochs(range(5)):
            for number, index in enumerate(batches, batches.start):
                assert number == index
                loop.update(tf.constant(DATA[index]))
                run.step()
                seen.append((epoch, index))
                if len(seen) == killed:
                    run._recorder.position()  # waits for the file
                    raise Killed
            seen.append(("evaluated", epoch))
    return seen


def test_epochs_are_numbered_and_the_last_is_cut_where_the_program_stops(tmp_path):
    whole = [(epoch, index) for epoch in range(3) for index in range(5)][:12]
    expected = [*whole[:5], ("evaluated", 0), *whole[5:10], ("evaluated", 1), *whole[10:], ("evaluated", 2)]
    assert walk_epochs(tmp_path / "run") == expected


@pytest.mark.parametrize("killed", [1, 5, 8])
def test_epochs_begin_again_in_the_one_that_was_under_way_with_what_is_left_of_it(tmp_path, killed):
    whole = walk_epochs(tmp_path / "whole")
    with pytest.raises(Killed):
        walk_epochs(tmp_path / "run", killed + (killed > 5))  # an evaluation is among what was seen
    done = whole.index(("evaluated", 0)) if killed == 5 else killed + (killed > 5)
    assert walk_epochs(tmp_path / "run") == whole[done:]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [3, 5, 9])
def test_an_evaluation_between_updates_is_part_of_what_is_resumed(tmp_path, number):
    """It draws from the generator that the order of the data is drawn from."""

    def evaluated(directory, seed, killed=None):
        loop = training()
        loop.begin()
        np.random.seed(seed)
        with SnapshotRun(directory, CYCLES, loop.model, loop.optimizer, resume_every=1) as run:
            for x in run.batches(killed_loop.Shuffled()):
                if run.updates == killed:
                    run._recorder.position()  # waits for the file
                    raise Killed
                loop.update(x)
                run.step()
                if run.updates % 3 == 0:
                    loop.model(DATA[np.random.permutation(5)[0]], training=False)

    evaluated(tmp_path / "whole", 0)
    with pytest.raises(Killed):
        evaluated(tmp_path / "run", 0, number)
    evaluated(tmp_path / "run", 99)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_batches_come_epoch_after_epoch_until_the_program_stops(tmp_path):
    seen, loop = [], training()
    loop.begin()
    with SnapshotRun(tmp_path / "run", CYCLES, loop.model, loop.optimizer) as run:
        for index in run.batches(range(5)):
            seen.append(index)
            loop.update(tf.constant(DATA[index]))
            run.step()
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_sigterm_writes_a_resume_point_and_no_member_and_the_run_resumes_from_there(tmp_path):
    train_whole(tmp_path / "whole")

    def terminate(call):
        if call == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        train_whole(tmp_path / "run", after_call=terminate)
    assert left.value.code == 143
    assert [member.step for member in SnapshotStore(tmp_path / "run").members] == [4, 8]
    np.random.seed(99)
    assert train(tmp_path / "run", training()) == 2  # the tenth update answered the signal
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_the_first_ctrl_c_writes_a_resume_point_and_the_run_resumes_there(tmp_path):
    train_whole(tmp_path / "whole")

    def interrupted(call):
        if call == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_whole(tmp_path / "run", after_call=interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    np.random.seed(99)
    assert train(tmp_path / "run", training()) == 2  # the tenth update answered the signal
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_the_second_ctrl_c_leaves_at_once_and_the_run_resumes_from_the_point_before(tmp_path):
    train_whole(tmp_path / "whole")

    def interrupted(call):
        if call == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        train_whole(tmp_path / "run", after_call=interrupted)
    np.random.seed(99)
    assert train(tmp_path / "run", training()) == 8  # the first member's
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: keras.optimizers.Adam(SnapshotSchedule(CYCLES), beta_1=0.5),
            "beta_1 0.9 saved, 0.5 given, 0.5 in force",
        ),
        (
            lambda: keras.optimizers.Adam(SnapshotSchedule(CYCLES), clipnorm=2.0),
            "clipnorm None saved, 2.0 given, 2.0 in",
        ),
    ],
)
def test_settings_that_differ_are_named_on_a_resume(tmp_path, caplog, make, said):
    leave(tmp_path / "run")
    with SnapshotRun(tmp_path / "run", CYCLES, killed_loop.make_model(), make()) as run:
        assert run.updates == 4
    (line,) = [record.getMessage() for record in caplog.records if "settings differ" in record.getMessage()]
    assert said in line


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_process_that_is_really_killed_resumes_in_another(tmp_path, name):
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
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for other in (keras.optimizers.SGD, keras.optimizers.AdamW):
        with pytest.raises(StoreError, match=r"holds a run trained by Adam, got (SGD|AdamW): give that optimizer"):
            SnapshotRun(tmp_path / "run", CYCLES, model, other(SnapshotSchedule(CYCLES)))
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="other")])
    before = [weight.tolist() for weight in other.get_weights()]
    with pytest.raises(DataError, match=r"the resume point does not fit the model .*\(\d+ differences\)"):
        SnapshotRun(tmp_path / "run", CYCLES, other, optimizer("adam"))
    assert [weight.tolist() for weight in other.get_weights()] == before
    assert train(tmp_path / "run", training()) == 8
