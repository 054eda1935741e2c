"""The oracle against what is known without it: differences, the paper's numbers, and what tells two rules apart."""

import numpy as np
import pytest

from . import oracle
from .job import BOUNDS, JOBS, deviations, expected


def objective(network, weights, x, y, weight_decay):
    """The loss whose gradient is meant: cross-entropy, and L2 of all that is trained."""
    loss = oracle.loss_and_gradients(network, weights, x, y)[0]
    trained = (value for name, value in weights.items() if not name.endswith(oracle.STATISTICS))
    return loss + weight_decay / 2 * sum((value**2).sum() for value in trained)


@pytest.mark.parametrize("model", JOBS)
def test_gradients_are_those_of_differences(model):
    job, network, draw = JOBS[model], oracle.NETWORKS[model](), np.random.default_rng(3)
    weights = {name: value.astype(np.float64) for name, value in job.initial.items()}
    x, y = job.data.x[:6].astype(np.float64), job.data.y[:6]
    _, gradients, _ = oracle.loss_and_gradients(network, weights, x, y, weight_decay=0.1)
    assert gradients.keys() == {name for name in weights if not name.endswith(oracle.STATISTICS)}
    for name, gradient in gradients.items():
        direction = draw.standard_normal(gradient.shape)
        ahead, behind = (
            objective(network, {**weights, name: weights[name] + side * direction}, x, y, 0.1) for side in (1e-6, -1e-6)
        )
        assert (ahead - behind) / 2e-6 == pytest.approx((gradient * direction).sum(), rel=1e-5, abs=1e-7), name


def test_rates_are_those_of_the_papers_equation():
    # Half of 1 + cos of 0, 45, 90 and 135 degrees.
    once = [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]
    assert [oracle.rate(t, 1.0, 12, 3) for t in range(1, 13)] == pytest.approx(once * 3)


def test_the_last_cycle_ends_with_the_training_when_it_does_not_fit():
    assert oracle.ends(12, 3) == (4, 8, 12)
    assert oracle.ends(230, 4) == (58, 116, 174, 230)
    assert oracle.ends(9, 4) == (3, 6, 9)


@pytest.mark.parametrize("rates", [[0.1] * 6, [0.1, 0.3, 0.05, 0.2, 0.4, 0.01]], ids=["constant", "moving"])
def test_the_rules_are_one_while_the_rate_is_constant_and_two_when_it_moves(rates):
    ends = []
    for rule in oracle.RULES.values():
        weights, velocity = 1.0, 0.0
        for lr in rates:
            weights, velocity = rule(weights, velocity, 2 * weights, lr, 0.9)
        ends.append(weights)
    assert (ends[0] == pytest.approx(ends[1])) is (len(set(rates)) == 1)


@pytest.mark.parametrize("rule", oracle.RULES)
def test_the_rate_used_is_found_in_the_weights(rule):
    before, velocity, gradient = np.random.default_rng(0).standard_normal((3, 50))
    after, _ = oracle.RULES[rule](before, velocity, gradient, 0.037, 0.9)
    assert oracle.rate_used(rule, before, after, velocity, gradient, 0.9) == pytest.approx(0.037)


@pytest.mark.parametrize(("ddof", "variance"), [(0, 2.0), (1, 3.0)])
def test_the_running_variance_moves_a_tenth_of_the_way_to_that_of_n_or_n_minus_1_values(ddof, variance):
    weights = {"n/scale": np.ones(1), "n/shift": np.zeros(1), "n/mean": np.zeros(1), "n/variance": np.ones(1)}
    statistics = {}
    x = np.array([1.0, 2.0, 3.0 + 6**0.5 / 2]).reshape(3, 1, 1, 1)
    x = (x - x.mean()) / x.std() * 2**0.5 + 5  # three values of mean 5 and variance 2, or 3 if by n − 1
    oracle.normalisation("n", ddof)(weights, x, statistics)
    assert statistics["n/mean"] == pytest.approx(0.5)
    assert statistics["n/variance"] == pytest.approx(0.9 + 0.1 * variance)


@pytest.mark.parametrize("model", JOBS)
def test_a_framework_of_the_other_rule_would_be_found(model):
    apart = deviations(expected(JOBS[model], "updates", 0), expected(JOBS[model], "gradients", 0))
    for quantity in ("loss", "weights", "ensembles"):
        assert apart[quantity] > 10 * BOUNDS[quantity], quantity


def test_a_running_variance_of_the_other_kind_would_be_found():
    apart = deviations(expected(JOBS["cnn"], "gradients", 0), expected(JOBS["cnn"], "gradients", 1))
    assert apart["loss"] == 0
    for quantity in ("batch statistics", "ensembles"):
        assert apart[quantity] > 3 * BOUNDS[quantity], quantity


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("name", ["conv1/kernel", "norm2/shift", "norm3/scale", "dense1/bias"])
def test_a_gradient_a_tenth_too_small_would_be_found_in_the_cnn(name, monkeypatch):
    right = oracle.loss_and_gradients

    def wrong(*arguments):
        loss, gradients, statistics = right(*arguments)
        return loss, {**gradients, name: 0.9 * gradients[name]}, statistics

    monkeypatch.setattr(oracle, "loss_and_gradients", wrong)
    found = expected.__wrapped__(JOBS["cnn"], "gradients", 0)
    monkeypatch.undo()
    assert deviations(found, expected(JOBS["cnn"], "gradients", 0))["loss"] > 10 * BOUNDS["loss"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", oracle.RULES)
@pytest.mark.parametrize("model", JOBS)
def test_the_jobs_are_ones_whose_course_rounding_does_not_decide(model, rule):
    for noise in range(3):
        apart = deviations(expected(JOBS[model], rule, 0, noise), expected(JOBS[model], rule, 0))
        for quantity in ("loss", "weights", "ensembles"):
            assert apart[quantity] < BOUNDS[quantity] / 2, quantity
