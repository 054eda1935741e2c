"""What is computed from kept predictions: ten members, 10,000 examples, 100 classes."""

import numpy as np
import pytest
from scipy.special import log_softmax

from snapcore.ensemble import (
    Predictions,
    fit_cascade,
    fit_temperature,
    fit_weights,
    prefix_curve,
    run_cascade,
    select,
    uncertainty,
)

from .compare import Contender

MEMBERS, EXAMPLES, CLASSES, PICKS = 10, 10_000, 100, 25


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    random = np.random.default_rng(0)
    labels = random.integers(CLASSES, size=EXAMPLES)
    logits = 2 * random.standard_normal((MEMBERS, EXAMPLES, CLASSES), dtype=np.float32)
    logits[:, np.arange(EXAMPLES), labels] += 3
    path = tmp_path_factory.mktemp("kept") / "test.safetensors"
    Predictions(log_softmax(logits, axis=-1), labels).save(path)
    return Predictions.open(path)


def as_published(probabilities, labels):
    """Greedy selection as its authors and AutoGluon write it: every candidate's mean is formed and scored whole."""
    total, picks, losses, rows = np.zeros(probabilities.shape[1:]), [], [], np.arange(len(labels))
    for count in range(1, PICKS + 1):
        scores = [-np.log(((total + candidate) / count)[rows, labels]).mean() for candidate in probabilities]
        picks.append(int(np.argmin(scores)))
        losses.append(min(scores))
        total += probabilities[picks[-1]]
    return np.bincount(picks[: int(np.argmin(losses)) + 1], minlength=len(probabilities))


def test_selection_beside_the_algorithm_as_published(compare, predictions):
    probabilities = np.exp(predictions[:].astype(np.float64))
    found = select(predictions, size=PICKS).weights
    wanted = as_published(probabilities, predictions.labels)
    np.testing.assert_allclose(found, wanted / wanted.sum())
    compare(
        f"select, {MEMBERS} × {EXAMPLES} × {CLASSES}, {PICKS} choices",
        Contender(lambda: select(predictions, size=PICKS)),
        {
            "the same, each candidate's mean formed whole": Contender(
                lambda: as_published(probabilities, predictions.labels)
            )
        },
        target="≤ 0.2",
    )


@pytest.mark.parametrize("function", [prefix_curve, fit_weights, fit_temperature, uncertainty])
def test_a_question_that_kept_predictions_answer(compare, predictions, function):
    compare(
        f"{function.__name__}, {MEMBERS} × {EXAMPLES} × {CLASSES}",
        Contender(lambda: function(predictions)),
        {},
        target="≤ 1 s",
    )


def test_a_cascade_that_is_fitted(compare, predictions):
    name = f"fit_cascade, {MEMBERS} × {EXAMPLES} × {CLASSES}"
    compare(name, Contender(lambda: fit_cascade(predictions, tolerance=0.1)), {}, pairs=7)


def test_a_cascade_that_is_run(compare, predictions):
    recipe = fit_cascade(predictions, tolerance=0.1)
    name = f"run_cascade, {MEMBERS} × {EXAMPLES} × {CLASSES}"
    compare(name, Contender(lambda: run_cascade(predictions, recipe)), {}, pairs=7)
