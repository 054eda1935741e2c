"""Log-probabilities for tests: of sure and unsure members, some labels at −10,000 nats and some at −inf."""

import numpy as np
from hypothesis import strategies as st

from snapcore.ensemble import Predictions


def log_softmax(logits):
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def some_logs(n_members=4, examples=30, classes=3, *, scale=1.0, seed=7):
    """Members that know something of the labels, [members, examples, classes], and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=examples)
    truth = 1.5 * np.eye(classes)[labels]
    return log_softmax(scale * (truth + rng.normal(size=(n_members, examples, classes)))), labels


def some_predictions(*shape, **options):
    logs, labels = some_logs(*shape, **{name: options.pop(name) for name in ("scale", "seed") if name in options})
    return Predictions(logs, labels, **options)


@st.composite
def log_probabilities(draw, *, impossible=True, max_members=5, examples=(1, 12), classes=(2, 5)):
    """Draw float32 log-probabilities [members, examples, classes], and labels."""
    shape = [draw(st.integers(1, max_members)), draw(st.integers(*examples)), draw(st.integers(*classes))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logs = log_softmax(rng.normal(size=shape) * draw(st.sampled_from([0.1, 1.0, 5.0, 300.0, 3000.0])))
    if impossible and draw(st.booleans()):
        gone = (rng.random(shape) < 0.2) & (logs < logs.max(axis=-1, keepdims=True))
        logs = log_softmax(np.where(gone, -np.inf, logs))
    return np.maximum(logs, -1e4, where=np.isfinite(logs), out=logs).astype(np.float32), rng.integers(
        shape[2], size=shape[1]
    )
