"""The suite on a backend of a hundred lines, and on ones that break a single rule each."""

from dataclasses import replace

import numpy as np
import pytest

from snapcore.backend import resolved
from snapcore.testing import BackendConformance

from .numpy_backend import Copied, NumpyBackend


class TestNumpyBackend(BackendConformance):
    random_model = "dropout"
    plain_model = "plain"

    def backend(self):
        return NumpyBackend()


class Rule01(NumpyBackend):
    """A restarted member's weights come from nowhere."""

    def init(self, model, data, program, *, seed, member=1, **options):
        random = int(np.random.default_rng().integers(2**31)) if member > 1 else seed
        return super().init(model, data, program, seed=random, member=member, **options)


class Rule02(NumpyBackend):
    """Every member begins with the same weights."""

    def init(self, model, data, program, *, seed, member=1, **options):
        return super().init(model, data, program, seed=seed, **options)


class Rule03(NumpyBackend):
    """A capture is the live arrays, and training changes them in place."""

    def capture(self, state):
        return Copied(state.weights)

    def train(self, state, start, stop, *, report):
        after = super().train(state, start, stop, report=report)
        for name, array in after.weights.items():
            state.weights[name][...] = array
        return replace(after, weights=state.weights)


class Rule04(NumpyBackend):
    """A capture leaves the running mean out."""

    def capture(self, state):
        return Copied({name: array for name, array in super().capture(state).tensors.items() if name != "mean"})

    def restore(self, state, tensors, *, optimizer):
        mean = {"mean": state.weights["mean"]}
        return super().restore(state, tensors and {**tensors, **mean}, optimizer=optimizer)

    def dump(self, state):
        copied, values = super().dump(state)
        return Copied(copied.tensors | {"velocity/mean": copied.tensors.pop("weights/mean")}), values

    def load(self, state, tensors, values):
        tensors = dict(resolved(tensors))
        return super().load(state, tensors | {"weights/mean": tensors.pop("velocity/mean")}, values)


class Rule05(NumpyBackend):
    """A buffer that no logit shows is not restored."""

    def restore(self, state, tensors, *, optimizer):
        after = super().restore(state, tensors, optimizer=optimizer)
        return replace(after, weights={**after.weights, "batches": state.weights["batches"]})


class Rule06(NumpyBackend):
    """The rate is cut off."""

    def rate(self, state, step):
        return min(state.schedule(step), 0.015)


class Rule07(NumpyBackend):
    """Every call of train begins without momentum."""

    def train(self, state, start, stop, *, report):
        return super().train(self.restore(state, None, optimizer="reset"), start, stop, report=report)


class Rule08(NumpyBackend):
    """Updates are reported by the step they began at."""

    def train(self, state, start, stop, *, report):
        return super().train(state, start, stop, report=lambda step, loss: report(step - 1, loss))


class Rule09(NumpyBackend):
    """A reset resets nothing."""

    def restore(self, state, tensors, *, optimizer):
        return super().restore(state, tensors, optimizer="keep")


class Rule10(NumpyBackend):
    """Moments are reset whatever was asked."""

    def restore(self, state, tensors, *, optimizer):
        return super().restore(state, tensors, optimizer="reset")


class Rule11(NumpyBackend):
    """Evaluation draws from the random state of training."""

    def logits(self, state, x):
        if state.noise:
            state.noise.random()
        return super().logits(state, x)


class Rule12(NumpyBackend):
    """Loading forgets the velocity."""

    def load(self, state, tensors, values):
        return self.restore(super().load(state, tensors, values), None, optimizer="reset")


class Rule13(NumpyBackend):
    """Capturing draws from the random state of training."""

    def capture(self, state):
        if state.noise:
            state.noise.random()
        return super().capture(state)


class Rule14(NumpyBackend):
    """A dump has names of its own."""

    def dump(self, state):
        copied, values = super().dump(state)
        return Copied({name.replace("weights/", "model/"): array for name, array in copied.tensors.items()}), values

    def load(self, state, tensors, values):
        tensors = {name.replace("model/", "weights/"): array for name, array in resolved(tensors).items()}
        return super().load(state, tensors, values)


class Rule15(NumpyBackend):
    """Whatever fits is taken, and the rest ignored."""

    def restore(self, state, tensors, *, optimizer):
        fitting = {name: array for name, array in (tensors or {}).items() if array.shape == state.weights[name].shape}
        return super().restore(state, {**state.weights, **fitting}, optimizer=optimizer)


class Rule16(NumpyBackend):
    """Statistics keep half of what they were."""

    def refresh(self, state, x):
        fresh = super().refresh(state, x)
        mean = (fresh.weights["mean"] + state.weights["mean"]) / 2
        return replace(fresh, weights={**fresh.weights, "mean": mean})


class Rule17(NumpyBackend):
    """The gaussian's loss is half of what it is without the constant: another loss, with the same minimum."""

    @property
    def losses(self):
        def another(outputs, y, ignore):
            loss, error = super(Rule17, self).losses["gaussian-nll"](outputs, y, ignore)
            return loss - np.log(2 * np.pi) / 2, error

        return super().losses | {"gaussian-nll": another}


RULES = sorted(name for name in dir(BackendConformance) if name.startswith("test_rule_"))
BROKEN = [Rule01, Rule02, Rule03, Rule04, Rule05, Rule06, Rule07, Rule08, Rule09, Rule10, Rule11, Rule12, Rule13]
BROKEN += [Rule14, Rule15, Rule16, Rule17]


def keeps(suite, rule):
    try:
        getattr(suite, rule)()
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("broken", BROKEN)
def test_a_backend_that_breaks_one_rule_fails_at_exactly_that_rule(broken):
    class Suite(BackendConformance):
        random_model = "dropout"
        plain_model = "plain"

        def backend(self):
            return broken()

    failed = [rule for rule in RULES if not keeps(Suite(), rule)]
    assert [rule[5:12] for rule in failed] == [broken.__name__.replace("Rule", "rule_")]


def test_every_rule_has_a_backend_that_breaks_it():
    assert [rule[5:12].replace("rule_", "Rule") for rule in RULES] == [broken.__name__ for broken in BROKEN]


def test_a_backend_that_re_estimates_nothing_is_found():
    class Idle(NumpyBackend):
        def refresh(self, state, x):
            return state

    class Suite(BackendConformance):
        def backend(self):
            return Idle()

    with pytest.raises(AssertionError, match="was not re-estimated"):
        Suite().test_rule_16_statistics_are_re_estimated_from_weights_and_inputs_alone()


def test_a_suite_must_say_which_backend_it_tests():
    with pytest.raises(NotImplementedError):
        BackendConformance().backend()
