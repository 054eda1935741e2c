"""The Keras and TensorFlow adapters beside Keras' own schedule, `fit` without the callback, and loops by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapcore import CosineCycles

from .compare import Ratios, rows
from .workloads import digits

UPDATES = 200
FIT_PAIRS = 15
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("model", ["cnn", "mlp"])
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_fit_with_the_callback_beside_fit_without_it(benchmark, table, tmp_path, backend, model):
    words = [sys.executable, "-m", "tests.bench.keras_workloads", str(tmp_path), str(FIT_PAIRS), model]
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

    def fit():
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    times = benchmark.pedantic(fit, rounds=1)
    ratios = Ratios(times.pop("with"), times)
    benchmark.extra_info["ratios"] = {peer: ratios.of(peer)._asdict() for peer in times}
    name = f"Keras on {backend}: fit with the callback, between boundaries, {model.upper()}, per update"
    table.extend(rows(name, ratios, "interval reaches ≤ 1.02"))


def test_schedule_beside_that_of_keras(compare):
    import keras

    from snapcore_keras import SnapshotSchedule

    from .keras_workloads import LR, updating

    ours = SnapshotSchedule(CosineCycles(lr=LR, steps=60_000, cycles=6))
    theirs = keras.optimizers.schedules.CosineDecayRestarts(LR, 10_000, t_mul=1.0)
    compare(
        "Keras on TensorFlow: compiled SGD update, SnapshotSchedule",
        updating(ours, 500),
        {"with CosineDecayRestarts": updating(theirs, 500), "with a plain rate": updating(LR, 500)},
    )


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_managed_loop_beside_hand_written_ones(compare, model):
    from .keras_workloads import by_hand, managed

    data = digits()
    updates = UPDATES if model == "mlp" else UPDATES // 4
    compare(
        f"TensorFlow: managed loop, {model.upper()} on digits, per update",
        managed(data, model, updates),
        {
            f"by hand, tf.function over {updates} updates": by_hand(data, model, updates, loop="tensorflow"),
            "by hand, Python loop over one compiled update": by_hand(data, model, updates, loop="python"),
        },
        target="interval reaches ≤ 1.02",
    )
