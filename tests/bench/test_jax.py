"""The JAX adapter beside optax, loops written by hand, orbax, and each of its ways to run an ensemble."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from snapcore import CosineCycles, StepDecay

from .compare import PAIRS, Contender, Row
from .workloads import NAMES, digits

MEMBERS = 6
SNAPSHOTS = 500
UPDATES = 200


@pytest.mark.parametrize("cycles", [2, 6, 60])
def test_schedule_beside_that_of_optax(compare, benchmark, table, cycles):
    from snapcore_jax import snapshot_schedule

    from .jax_workloads import equations, sgdr, updating

    schedule = CosineCycles(lr=0.1, steps=100 * cycles, cycles=cycles)
    ours, theirs, middle = snapshot_schedule(schedule), sgdr(schedule), schedule.steps // 2
    counts = equations(ours), equations(theirs)
    share = f"{counts[0] / counts[1]:.3f}"
    table.append(
        Row(f"equations traced, {cycles} cycles", str(counts[0]), "optax.sgdr_schedule", str(counts[1]), share)
    )
    compare(
        f"compiled optax.sgd update, snapshot_schedule of {cycles} cycles",
        updating(ours, middle, 500),
        {"with optax.sgdr_schedule": updating(theirs, middle, 500)},
    )
    benchmark.extra_info["equations"] = {"snapshot_schedule": counts[0], "optax.sgdr_schedule": counts[1]}


def test_managed_loop_beside_hand_written_ones(compare):
    from .jax_workloads import by_hand, managed

    data = digits()
    compare(
        "JAX: managed loop, MLP on digits, per update",
        managed(data, UPDATES),
        {
            f"by hand, lax.scan over {UPDATES} updates": by_hand(data, UPDATES, loop="scan"),
            "by hand, Python loop over one compiled update": by_hand(data, UPDATES, loop="python"),
        },
        target="interval reaches ≤ 1.02",
    )


def test_loop_waits_for_a_snapshot_about_as_long_as_for_a_copy(compare, tmp_path):
    from .jax_workloads import device_copies, hundred_megabytes

    tree, kept = hundred_megabytes(), []
    with _Snapshots(tmp_path / "run", tree) as run, _Orbax(tmp_path / "orbax", tree) as orbax:

        def prepare() -> None:
            """Begin every sample of each alike: nothing is being written, and nobody holds a copy."""
            run.idle()
            orbax.idle()
            kept.clear()

        compare(
            "JAX: run.step() that takes 100 MB",
            Contender(run.take, lambda: run.advance(prepare)),
            {
                "jax.tree.map(jnp.copy, tree), waited for": Contender(device_copies(tree, kept, wait=True), prepare),
                "the same, not waited for": Contender(device_copies(tree, kept, wait=False), prepare),
                "orbax CheckpointManager.save, until it returns": Contender(orbax.take, prepare),
            },
            target="≤ 1.3",
        )


@pytest.mark.parametrize(("batch", "number"), [(1, 64), (32, 16), (512, 1)])
@pytest.mark.parametrize("model", ["mlp", "cnn", "residual"])
def test_tuned_ensemble_beside_its_best_strategy(compare, model, batch, number):
    import jax

    from .jax_workloads import SHAPE, looped, members, predicting, tuned_and_best

    weights, apply_fn = members(model, MEMBERS)
    x = jax.random.normal(jax.random.key(0), (batch, *SHAPE))
    number *= 4 if model == "mlp" else 1
    tuned, best, fixed = tuned_and_best(weights, apply_fn, x, number, PAIRS)
    compare(
        f"JAX: tuned ensemble ({tuned.strategy}), {MEMBERS} {NAMES[model]} 8×8, batch {batch}",
        predicting(tuned, x, number),
        {
            f"its best strategy ({best})": predicting(fixed, x, number),
            "Python loop over compiled members": predicting(looped(weights, apply_fn), x, number),
        },
        target="≤ 1.05",
    )


class _Snapshots(ExitStack):
    """A run whose every step takes a snapshot."""

    def __init__(self, directory: Path, tree: Any) -> None:
        import jax.numpy as jnp
        import optax

        from snapcore_jax import SnapshotRun

        super().__init__()
        schedule = StepDecay(lr=0.1, steps=SNAPSHOTS, snapshots=SNAPSHOTS)
        self._directory, self._run = directory, self.enter_context(SnapshotRun(directory, schedule, rate=schedule))
        self.callback(self.idle)
        self._held = self._run.start(tree, optax.ScaleByScheduleState(jnp.int32(0)))  # all that plain SGD keeps

    def idle(self) -> None:
        """Wait for the writer, and delete what it has written."""
        self._run._recorder._saving.drain()
        for file in self._directory.glob("snapshot-*"):
            file.unlink()

    def advance(self, prepare: Callable[[], None]) -> None:
        """Count an update, as the optimizer would, and prepare for the sample."""
        variables, rest = self._held
        self._held = variables, rest._replace(count=(rest.count + 1).block_until_ready())
        prepare()

    def take(self) -> None:
        self._held = self._run.step(*self._held)


class _Orbax(ExitStack):
    """A checkpoint manager that saves asynchronously, as it does by default, and keeps the last."""

    def __init__(self, directory: Path, tree: Any) -> None:
        import orbax.checkpoint as ocp

        super().__init__()
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self._manager = self.enter_context(ocp.CheckpointManager(directory, options=options))
        self.callback(self.idle)
        self._steps, self._args = count(), ocp.args.StandardSave(tree)

    def idle(self) -> None:
        self._manager.wait_until_finished()

    def take(self) -> None:
        self._manager.save(next(self._steps), args=self._args)
