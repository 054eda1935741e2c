"""Both rules of momentum, against the rules written out in NumPy."""

import keras
import numpy as np
import pytest

from snapcore import CosineCycles, DataError
from snapcore_keras.optimizers import Sgd
from snapcore_keras.schedule import SnapshotSchedule

CYCLES = CosineCycles(lr=0.3, steps=20, cycles=2)
DECAY = 0.01


def by_hand(gradients, weight, momentum, nesterov, velocity):
    moment = np.zeros_like(weight)
    for step, gradient in enumerate(gradients):
        rate = 0.15 * (np.cos(np.pi * (step % 10) / 10) + 1)
        slope = gradient + DECAY * weight
        if velocity == "gradients":
            moment = momentum * moment + slope
            weight = weight - rate * (slope + momentum * moment if nesterov else moment)
        else:
            moment = momentum * moment - rate * slope
            weight = weight + (momentum * moment - rate * slope if nesterov else moment)
    return weight


@pytest.mark.parametrize("velocity", ["updates", "gradients"])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_twenty_updates_at_a_moving_rate_are_those_of_the_rule(velocity, momentum, nesterov):
    rng = np.random.default_rng(0)
    begin, gradients = rng.normal(size=(3, 2)), rng.normal(size=(20, 3, 2))
    weight = keras.Variable(begin.astype(np.float32))
    optimizer = Sgd(SnapshotSchedule(CYCLES), momentum=momentum, nesterov=nesterov, l2=DECAY, velocity=velocity)
    optimizer.build([weight])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")], [weight])
    wanted = by_hand(gradients, begin, momentum, nesterov, velocity)
    np.testing.assert_allclose(weight.numpy(), wanted, atol=2e-5)


def test_the_rules_are_two_while_the_rate_moves_and_one_while_it_stays():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(20, 4)).astype(np.float32)

    def ended(rate, velocity):
        weight = keras.Variable(np.ones(4, np.float32))
        optimizer = Sgd(rate, velocity=velocity)
        optimizer.build([weight])
        for gradient in gradients:
            optimizer.apply([keras.ops.convert_to_tensor(gradient)], [weight])
        return weight.numpy()

    np.testing.assert_allclose(ended(0.1, "updates"), ended(0.1, "gradients"), atol=1e-5)
    moving = SnapshotSchedule(CYCLES)
    assert np.abs(ended(moving, "updates") - ended(moving, "gradients")).max() > 0.1


def test_it_is_made_again_from_its_description():
    config = Sgd(0.2, momentum=0.8, nesterov=False, l2=0.5, velocity="gradients").get_config()
    again = Sgd.from_config(config)
    assert (again.momentum, again.nesterov, again.l2, again.velocity) == (0.8, False, 0.5, "gradients")


def test_an_unknown_velocity_is_refused():
    with pytest.raises(DataError, match=r"velocity must be one of \['gradients', 'updates'\], got 'sums'"):
        Sgd(0.1, velocity="sums")
