"""How long a snapshot of ResNet-50's size keeps a loop in JAX waiting.

The network is dense, with as many parameters as ResNet-50, which would take a good part of the time to compile.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import Setting, Suite
from compare import Contender
from jax_common import about, dense, dense_update, donating, noise
from snapshots import wait_for_members

from snapcore import Schedule, StepDecay
from snapcore_jax import SnapshotRun

suite = Suite(about())


RATE = 0.1


class Training:
    """Dense layers with 25.6 million parameters; on a CPU fewer. What an update is given, it is given away."""

    def __init__(self, setting: Setting) -> None:
        width, layers = setting.pick(full=(1011, 25), small=(256, 25), tiny=(32, 2))
        batch = setting.pick(full=4096, small=64, tiny=8)
        optimizer = optax.sgd(RATE, momentum=0.9)  # it counts nothing: calls of `run.step` count
        self._params = dense(width, layers)
        self._rest = optimizer.init(self._params)
        self._update = donating(dense_update(optimizer))
        self._batch = noise(batch, width), noise(batch, width, seed=1)
        self.update()
        self.wait()
        sizes = [array.size for array in self._params.values()]
        setting.found |= {"parameters": sum(sizes), "bytes of weights and moments": 8 * sum(sizes), "batch": batch}

    def update(self) -> None:
        self._params, self._rest = self._update(self._params, self._rest, *self._batch)

    def start(self, run: SnapshotRun) -> None:
        self._params, self._rest = run.start(self._params, self._rest)

    def step(self, run: SnapshotRun) -> None:
        self._params, self._rest = run.step(self._params, self._rest)

    def wait(self) -> None:
        jax.block_until_ready(self.state())

    def state(self) -> Any:
        """Return all that is copied at a trough: weights, and for the resume point the moments."""
        return self._params, self._rest


@jax.jit
def copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@contextmanager
def opened(training: Training, directory: Path, schedule: Schedule) -> Iterator[tuple[SnapshotRun, Callable[[], None]]]:
    """Give a run, and what waits until its members are written and the device has nothing left to do."""
    with SnapshotRun(directory, schedule, rate=RATE) as run:
        training.start(run)
        troughs = schedule.snapshot_steps

        def idle() -> None:
            training.wait()
            wait_for_members(directory, sum(step <= run.updates for step in troughs))

        yield run, idle
        training.step(run)
        run.finish("measured")


@suite.comparison("run.step() at a trough, until it returns")
def until_it_returns(setting: Setting) -> None:
    training = Training(setting)
    kept: list[Any] = []
    with opened(training, setting.folder / "run", StepDecay(lr=0.1, steps=500, snapshots=500)) as (run, idle):

        def prepare() -> None:
            training.update()  # an array that was fetched once is not fetched again
            idle()
            kept.clear()

        def update() -> None:
            training.update()
            training.wait()

        def copy_on_device() -> None:
            kept.append(jax.block_until_ready(copied(training.state())))

        def copy_to_host() -> None:
            kept.append(jax.tree.map(np.array, training.state()))

        setting.compare(
            {"run.step() at a trough": Contender(lambda: training.step(run), prepare)},
            {
                "an update, waited for": Contender(update, prepare),
                "a copy on the device, waited for": Contender(copy_on_device, prepare),
                "a copy to the host, waited for": Contender(copy_to_host, prepare),
            },
        )


@suite.comparison("an update, run.step(), and the next update, waited for")
def trough_and_update(setting: Setting) -> None:
    training = Training(setting)
    every, never = StepDecay(lr=0.1, steps=500, snapshots=500), StepDecay(lr=0.1, steps=10**6)
    with (
        opened(training, setting.folder / "every", every) as (ours, idle),
        opened(training, setting.folder / "never", never) as (other, _),
    ):

        def around(run: SnapshotRun | None) -> Contender:
            def two_updates() -> None:
                training.update()
                if run:
                    training.step(run)
                training.update()
                training.wait()

            return Contender(two_updates, idle)

        setting.compare({"at a trough": around(ours)}, {"elsewhere": around(other), "without a run": around(None)})


@suite.comparison("updates with a snapshot among them, per update")
def throughput(setting: Setting) -> None:
    training = Training(setting)
    updates = setting.pick(full=200, small=10, tiny=4)
    often, never = StepDecay(lr=0.1, steps=500 * updates, snapshots=500), StepDecay(lr=0.1, steps=10**6)
    with (
        opened(training, setting.folder / "often", often) as (ours, idle),
        opened(training, setting.folder / "never", never) as (other, _),
    ):

        def train(run: SnapshotRun | None, number: int) -> None:
            for _ in range(number):
                training.update()
                if run:
                    training.step(run)
            training.wait()

        def contender(run: SnapshotRun | None) -> Contender:
            return Contender(lambda: train(run, updates), idle, units=updates)

        train(ours, updates // 2)  # so that what is written is written within a sample
        setting.compare(
            {f"one snapshot in {updates} updates": contender(ours)},
            {"the same run, none due": contender(other), "no run": contender(None)},
        )
