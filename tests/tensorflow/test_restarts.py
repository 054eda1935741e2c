"""What happens between members: other weights, and the optimizer's moments kept or reset."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapcore import CosineCycles, DataError, Program, ProtocolError, Restart, program
from snapcore.store import SnapshotStore
from snapcore_tensorflow.run import SnapshotRun
from snapcore_tensorflow.schedule import SnapshotSchedule

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)
X = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def make():
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((3,)), *layers])


def adam(rate=None):
    return keras.optimizers.Adam(SnapshotSchedule(CYCLES) if rate is None else rate)


def values(model):
    return [weight.tolist() for weight in model.get_weights()]


def moments(optimizer):
    """Whether each of the optimizer's moments has moved from zero."""
    tensors = [each.numpy() for each in optimizer.variables if each.name not in ("iteration", "learning_rate")]
    return [bool(np.any(tensor)) for tensor in tensors]


def starts(directory, what, model, optimizer, **options):
    """Train to the end; return what each member's training began with: weights, moments, count and rate."""
    optimizer.build(model.trainable_variables)

    @tf.function
    def update():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(X, training=True) - 1))
        optimizer.apply(tape.gradient(loss, model.trainable_variables))

    def state():
        return values(model), any(moments(optimizer)), int(optimizer.iterations), float(optimizer.learning_rate)

    found = [state()]
    with SnapshotRun(directory, what, model, optimizer, **options) as run:
        while not run.finished:
            update()
            run.step()
            if run.updates % 4 == 0 and not run.finished:
                found.append(state())
    return found


def member(directory, index):
    return [array.tolist() for array in SnapshotStore(directory).load(index).values()]


def expected(weights, moved):
    """What the second and the third member should begin with, given their weights."""
    return [(each, moved, 4 * place, pytest.approx(0.1)) for place, each in enumerate(weights, 1)]


def test_without_a_restart_a_member_starts_from_the_one_before_with_its_moments(tmp_path):
    begun = starts(tmp_path / "run", CYCLES, make(), adam())
    assert begun[1:] == expected([member(tmp_path / "run", 1), member(tmp_path / "run", 2)], True)


@pytest.mark.parametrize("rate", [None, 0.7])
@pytest.mark.parametrize(("kept", "moved"), [("keep", True), ("reset", False)])
def test_a_restart_from_the_first_brings_its_weights_and_statistics_back(tmp_path, kept, moved, rate):
    """Users ask for the choice to reset the optimizer or to keep it: nobody offers it."""
    begun = starts(tmp_path / "run", Program("mine", CYCLES, Restart("first", kept)), make(), adam(rate))
    assert begun[1:] == expected([member(tmp_path / "run", 1)] * 2, moved)


def test_star_restarts_from_the_first_with_new_moments_and_the_count_goes_on(tmp_path):
    begun = starts(tmp_path / "run", program("star", lr=0.1, steps=12, cycles=3), make(), adam())
    assert begun[1:] == expected([member(tmp_path / "run", 1)] * 2, False)
    assert [each.step for each in SnapshotStore(tmp_path / "run").members] == [4, 8, 12]


@pytest.mark.parametrize("as_model", [True, False])
def test_fresh_weights_come_from_init_by_the_members_number_and_stay_as_they_were_given(tmp_path, as_model):
    fresh, asked = {number: make() for number in (2, 3)}, []
    before = {number: values(model) for number, model in fresh.items()}

    def init(number):
        asked.append(number)
        return fresh[number] if as_model else dict(enumerate_names(fresh[number]))

    what = program("singlecycle", lr=0.1, steps=12, cycles=3)
    begun = starts(tmp_path / "run", what, make(), adam(), init=init)
    assert begun[1:] == expected([before[2], before[3]], False)
    assert asked == [2, 3]
    assert {number: values(model) for number, model in fresh.items()} == before


def enumerate_names(model):
    """The names of a member: the place of each weight decides."""
    return ((f"{place:03d}/any", array) for place, array in enumerate(model.get_weights()))


@pytest.mark.parametrize("method", ["singlecycle", "independent"])
def test_a_program_with_fresh_weights_and_no_init_is_refused_before_anything_is_written(tmp_path, method):
    with pytest.raises(ProtocolError, match=f"{method} starts members from fresh weights: pass init="):
        SnapshotRun(tmp_path / "run", program(method, lr=0.1, steps=12, cycles=3), make(), adam(0.1))
    assert not (tmp_path / "run").exists()


def test_fresh_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    what = program("singlecycle", lr=0.1, steps=12, cycles=3)
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    with pytest.raises(DataError, match=r"a restart.s member does not fit the model .*'002/"):
        starts(tmp_path / "run", what, make(), adam(), init=lambda _: other)
    assert len(SnapshotStore(tmp_path / "run").members) == 1
