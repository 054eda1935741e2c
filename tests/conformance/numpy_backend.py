"""A backend in NumPy: a network with one hidden layer and a running mean of its inputs, trained with momentum.

It is here to show how little a backend is, and to be broken on purpose.
"""

from dataclasses import dataclass, replace

import numpy as np

from snapcore.backend import resolved, targets
from snapcore.errors import DataError
from snapcore.store import check_fit

HIDDEN = 16


@dataclass(frozen=True)
class NumpyState:
    data: object
    schedule: object
    weights: dict
    velocity: dict
    momentum: float = 0.9
    noise: np.random.Generator | None = None  # of dropout, if the model has it
    centred: bool = True  # whether the inputs' mean is taken off


@dataclass(frozen=True)
class Copied:
    tensors: dict

    def resolve(self):
        return self.tensors


class NumpyBackend:
    name = "numpy"

    @property
    def losses(self):
        """Of (outputs, targets, the label to ignore): the loss, and its gradient by the outputs."""
        return {
            "cross-entropy": _cross_entropy,
            "binary-cross-entropy": _binary_cross_entropy,
            "squared-error": _squared_error,
            "gaussian-nll": _gaussian_nll,
        }

    def about(self):
        return f"numpy {np.__version__} on cpu"

    def init(self, model, data, program, *, seed, member=1, momentum=0.9):
        if model not in ("mlp", "dropout", "plain"):
            raise DataError(f"model must be 'mlp', 'dropout' or 'plain', got {model!r}")
        random = np.random.default_rng([seed, member])
        n_inputs = int(np.prod(data.x.shape[1:]))
        weights = {
            "mean": np.zeros(n_inputs, np.float32),  # buffers, as batch normalisation has them: a running mean
            "batches": np.zeros((), np.int64),  # and how many batches it was taken over
            "hidden": random.normal(0, n_inputs**-0.5, (n_inputs, HIDDEN)).astype(np.float32),
            "output": random.normal(0, HIDDEN**-0.5, (HIDDEN, data.n_outputs)).astype(np.float32),
        }
        velocity = {name: np.zeros_like(weights[name]) for name in ("hidden", "output")}
        noise = random if model == "dropout" else None
        return NumpyState(data, program.schedule, weights, velocity, momentum, noise, model != "plain")

    def train(self, state, start, stop, *, report):
        weights, velocity, y = _copied(state.weights), _copied(state.velocity), targets(state.data)
        for step, rows in zip(range(start, stop), state.data.indices(start, stop), strict=True):
            x = _flat(state.data.x[rows])
            mean = x.mean(0) if state.centred else np.zeros_like(weights["mean"])
            weights["mean"] += np.float32(0.1) * (mean - weights["mean"])
            weights["batches"] += 1
            loss, gradients = self.gradients(weights, x - mean, y[rows], state)
            for name, gradient in gradients.items():
                velocity[name] = np.float32(state.momentum) * velocity[name] + gradient
                weights[name] -= np.float32(self.rate(state, step)) * velocity[name]
            report(step + 1, loss)
        return replace(state, weights=weights, velocity=velocity)

    def gradients(self, weights, x, y, state):
        """Return the loss that the data name, and its gradients by hand."""
        mask = (state.noise.random((len(x), HIDDEN)) > 0.1).astype(np.float32) if state.noise else 1
        hidden, outputs = _forward(weights, x, mask)
        loss, error = self.losses[state.data.loss](outputs, y, state.data.ignore)
        back = (error @ weights["output"].T) * (hidden > 0) * mask
        return loss, {"hidden": x.T @ back, "output": hidden.T @ error}

    def rate(self, state, step):
        return state.schedule(step)

    def capture(self, state):
        return Copied(_copied(state.weights))

    def restore(self, state, tensors, *, optimizer):
        weights = state.weights if tensors is None else _checked(tensors, state.weights)
        velocity = state.velocity
        if optimizer == "reset":
            velocity = {name: np.zeros_like(array) for name, array in velocity.items()}
        return replace(state, weights=weights, velocity=velocity)

    def dump(self, state):
        tensors = {f"weights/{name}": array for name, array in _copied(state.weights).items()}
        tensors |= {f"velocity/{name}": array for name, array in _copied(state.velocity).items()}
        return Copied(tensors), {"noise": state.noise and state.noise.bit_generator.state}

    def load(self, state, tensors, values):
        tensors = resolved(tensors)
        if state.noise:
            state.noise.bit_generator.state = values["noise"]
        parts = {"weights": dict(state.weights), "velocity": dict(state.velocity)}
        for path, array in tensors.items():
            part, _, name = path.partition("/")
            parts[part][name] = array.copy()
        return replace(state, **parts)

    def logits(self, state, x):
        return _forward(state.weights, _flat(x) - state.weights["mean"])[1]

    def refresh(self, state, x):
        mean = _flat(x).mean(0)
        return replace(state, weights={**state.weights, "mean": mean, "batches": np.ones((), np.int64)})


def _copied(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def _checked(tensors, weights):
    shapes = {name: array.shape for name, array in weights.items()}
    check_fit({name: array.shape for name, array in tensors.items()}, shapes, "the member")
    return _copied(tensors)


def _flat(x):
    return x.reshape(len(x), -1).astype(np.float32)


def _forward(weights, x, mask=1):
    hidden = np.maximum(x @ weights["hidden"], 0) * mask
    return hidden, hidden @ weights["output"]


def _cross_entropy(logits, y, ignore):
    rows = np.arange(len(y))[y != ignore]
    logits = logits - logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits).sum(-1, keepdims=True))
    error = np.zeros_like(logits)
    error[rows] = np.exp(logits - log_sum)[rows] / len(rows)
    error[rows, y[rows]] -= 1 / len(rows)
    return float((log_sum[rows, 0] - logits[rows, y[rows]]).mean()), error


def _binary_cross_entropy(logits, y, _):
    likely = 1 / (1 + np.exp(-logits))
    return float(-np.log(np.where(y == 1, likely, 1 - likely)).mean()), (likely - y) / y.size


def _squared_error(outputs, y, _):
    return float(((outputs - y) ** 2).mean()), 2 * (outputs - y) / y.size


def _gaussian_nll(outputs, y, _):
    mean, log_variance = np.split(outputs, 2, axis=-1)
    off, precision = mean - y, np.exp(-log_variance)
    loss = (log_variance + off**2 * precision + np.log(2 * np.pi)).mean() / 2
    return float(loss), np.concatenate([off * precision, (1 - off**2 * precision) / 2], -1) / y.size
