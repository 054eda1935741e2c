"""The frameworks: what each calls the oracle's weights and how it lays them out, and a job done in one of them."""

import contextlib
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from snapcore import CosineCycles, program
from snapcore.backend import load_backend
from snapcore.ensemble import combine, prefix_curve
from snapcore.run import execute
from snapcore.store import SnapshotStore

from . import oracle
from .job import SHAPES, Course


@dataclass(frozen=True, eq=False)
class Framework:
    """One way to do a job.

    Arguments:
        backend: as `load_backend` knows it.
        rule: of the momentum, as the oracle knows it.
        ddof: 1 where the running variance is of n − 1 values.
        names: from a model and the framework's own names, in order, to those in the order of `SHAPES`.
        schedule: from a cosine schedule to the rates that the framework's own names.
        transposed: order of the oracle's axes in the framework's kernels, by their number of axes.
        options: for `init`.
        device: where to compute; a GPU may round more coarsely than float32.
    """

    backend: str
    rule: str
    ddof: int
    names: Callable[[str, list[str]], list[str]]
    schedule: Callable[[CosineCycles], Any]
    transposed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    device: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def own(self, model, weights, like):
        """Return the oracle's weights as the framework has them; what is beside them is taken from `like`."""
        pairs = zip(self.names(model, list(like)), weights.items(), strict=True)
        return {**like, **{own: value.transpose(self._axes(value)).copy() for own, (_, value) in pairs}}

    def canonical(self, model, tensors):
        """Return the framework's weights as the oracle has them, in float64."""
        pairs = zip(SHAPES[model], self.names(model, list(tensors)), strict=True)
        values = ((name, np.asarray(tensors[own], np.float64)) for name, own in pairs)
        return {name: value.transpose(np.argsort(self._axes(value))) for name, value in values}

    def _axes(self, value):
        return self.transposed.get(value.ndim, tuple(range(value.ndim)))


class Begun:
    """A backend whose runs begin with the job's weights."""

    def __init__(self, framework, job):
        self._framework, self._job, self._backend = framework, job, load_backend(framework.backend)

    def __getattr__(self, verb):
        return getattr(self._backend, verb)

    def init(self, *arguments, **options):
        state = self._backend.init(*arguments, **options)
        like = self._backend.capture(state).resolve()
        weights = self._framework.own(self._job.model, self._job.initial, like)
        return self._backend.restore(state, weights, optimizer="reset")


@functools.cache
def done(framework, job):
    """Return the course that a job takes in a framework: as `execute` does it, and once more an update at a time."""
    todo = program("snapshot", lr=job.lr, steps=job.steps, cycles=job.cycles)
    options = {"momentum": job.momentum, "weight_decay": job.weight_decay, **framework.options}
    backend, losses, (x, y) = Begun(framework, job), {}, job.test
    with framework.device(), tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        asked = {"model": job.model, "data": job.data, "directory": run, **options}
        state = execute(todo, backend, report=losses.__setitem__, **asked)
        store = SnapshotStore(run)
        members = [store.load(member.index) for member in store.members]
        outputs = [backend.logits(backend.restore(state, member, optimizer="keep"), x) for member in members]
        begun = backend.init(job.model, job.data, todo, seed=0, **options)
        rates, losses_off = walked(framework, job, backend, begun)
        schedule = np.asarray(framework.schedule(CosineCycles(job.lr, job.steps, job.cycles)), np.float64)
    p = np.stack([oracle.softmax(each.astype(np.float64)) for each in outputs])
    return Course(
        rates=rates,
        schedule=schedule,
        losses=np.array([losses[step] for step in range(1, job.steps + 1)]),
        losses_off=losses_off,
        steps=tuple(member.step for member in store.members),
        weights=[framework.canonical(job.model, member) for member in members],
        members=p,
        ensembles=np.stack([combine(p, last=m) for m in range(1, len(p) + 1)]),
        errors=[round(row["error"] * len(y) / 100) for row in prefix_curve(p, y)],
    )


def walked(framework, job, backend, state):
    """Return the rate of every update, and how far off its loss is, by what the oracle makes of the weights it had."""
    network, rates, off, losses = oracle.NETWORKS[job.model](framework.ddof), [], [], {}
    before, velocity = framework.canonical(job.model, backend.capture(state).resolve()), 0.0
    for step, batch in enumerate(job.data.indices(0, job.steps)):
        state = backend.train(state, step, step + 1, report=losses.__setitem__)
        after = framework.canonical(job.model, backend.capture(state).resolve())
        x, y = job.data.x[batch].astype(np.float64), job.data.y[batch]
        loss, gradients, _ = oracle.loss_and_gradients(network, before, x, y, job.weight_decay)
        was, now, gradient = (_joined(each, gradients) for each in (before, after, gradients))
        rate = oracle.rate_used(framework.rule, was, now, velocity, gradient, job.momentum)
        velocity = oracle.RULES[framework.rule](was, velocity, gradient, rate, job.momentum)[1]
        rates.append(rate)
        off.append(losses[step + 1] / loss - 1)
        before = after
    return np.array(rates), np.array(off)


def _joined(tensors, names):
    return np.concatenate([tensors[name].ravel() for name in names])


def torch_names(model, _):
    if model == "mlp":
        return [f"{position}.{part}" for position in (1, 3, 5) for part in ("weight", "bias")]
    norm = ("weight", "bias", "running_mean", "running_var")
    blocks = [f"{k}.{part}" for k in range(3) for part in ("0.weight", *(f"1.{each}" for each in norm))]
    return blocks + [f"{position}.{part}" for position in (4, 6) for part in ("weight", "bias")]


def torch_rates(cycles):
    import torch

    from snapcore_torch import SnapshotLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cycles.lr)
    scheduler, rates = SnapshotLR(optimizer, cycles), []
    for _ in range(cycles.steps):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return rates


def jax_names(model, _):
    dense = ("hidden/0", "hidden/1", "output") if model == "mlp" else ("hidden", "output")
    block = ("convolution/kernel", "norm/scale", "norm/bias", "norm/mean", "norm/var")
    blocks = [f"blocks/{k}/{part}" for k in range(3) for part in block] if model == "cnn" else []
    return blocks + [f"{layer}/{part}" for layer in dense for part in ("kernel", "bias")]


def jax_rates(cycles):
    import jax

    from snapcore_jax import snapshot_schedule

    return jax.jit(snapshot_schedule(cycles))(jax.numpy.arange(cycles.steps))


def jax_device():
    import jax

    return jax.default_device(jax.devices("cpu")[0])


def keras_names(_, own):
    """Their numbers are positions in the model, which has its weights in the oracle's order."""
    return sorted(own)


def keras_rates(cycles):
    from snapcore_keras import SnapshotSchedule

    rate = SnapshotSchedule(cycles)
    return [float(rate(step)) for step in range(cycles.steps)]


def keras_device():
    import keras

    return keras.device("cpu:0")


def of_keras(backend, velocity):
    return Framework(
        backend, velocity, 0, keras_names, keras_rates, options={"velocity": velocity}, device=keras_device
    )


FRAMEWORKS = {
    "torch": Framework(
        "torch", "gradients", 1, torch_names, torch_rates, {2: (1, 0), 4: (3, 2, 0, 1)}, {"device": "cpu"}
    ),
    "jax": Framework("jax", "gradients", 0, jax_names, jax_rates, device=jax_device),
    "keras": of_keras("keras", "updates"),
    "keras, gradients": of_keras("keras", "gradients"),
    "tensorflow": of_keras("tensorflow", "gradients"),
    "tensorflow, updates": of_keras("tensorflow", "updates"),
}
