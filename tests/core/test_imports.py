"""What importing a room loads: the first ones only the standard library, none of them a framework."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import snapcore

FRAMEWORKS = {"torch", "jax", "optax", "flax", "keras", "tensorflow", "snapcore_torch", "snapcore_keras"}
APPLICATION = {"lab", "__main__"}
ROOMS = sorted(f"snapcore.{r.name}" for r in pkgutil.iter_modules(snapcore.__path__) if r.name not in APPLICATION)
WITHOUT_NUMPY = ["snapcore", "snapcore.errors", "snapcore.schedule", "snapcore.protocol", "snapcore.backend"]


def modules_after(*imports):
    """The modules that each import adds, in one fresh interpreter."""
    code = """
import json, sys
known, added = set(sys.modules), []
for name in sys.argv[1:]:
    __import__(name)
    added.append(sorted(set(sys.modules) - known))
    known = set(sys.modules)
print(json.dumps(added))
"""
    done = subprocess.run([sys.executable, "-c", code, *imports], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [set(names) for names in json.loads(done.stdout)]


def test_the_schedule_loads_five_modules_of_the_standard_library_and_its_own_rooms():
    found = modules_after("math", "dataclasses", "warnings", "typing", "collections", "snapcore.schedule")[-1]
    assert found == {"snapcore", "snapcore.errors", "snapcore.schedule", "snapcore.protocol"}


@pytest.mark.parametrize("room", WITHOUT_NUMPY)
def test_the_first_rooms_load_nothing_but_the_standard_library(room):
    top = {name.partition(".")[0] for name in modules_after(room)[0]}
    assert top - sys.stdlib_module_names == {"snapcore"}


def test_no_room_of_the_core_loads_a_framework():
    for room, found in zip(ROOMS, modules_after(*ROOMS), strict=True):
        assert not FRAMEWORKS & {name.partition(".")[0] for name in found}, room


def test_the_rooms_are_there():
    assert {"snapcore.store", "snapcore.ensemble", "snapcore.metrics", "snapcore.run", "snapcore.diversity"} <= set(
        ROOMS
    )


WORTH = """
import sys
import numpy as np
from snapcore.diversity import ambiguity, correlation, disagreement, double_fault, weight_distance
from snapcore.ensemble import *
from snapcore.metrics import auroc, crps, gaussian_nll, perplexity, risk_coverage, rmse, score

p = np.random.default_rng(0).dirichlet(np.ones(3), size=(3, 40))
made = Predictions.from_probabilities(p, np.arange(40) % 3)
made.save(sys.argv[1] + "/p.safetensors")
made = Predictions.open(sys.argv[1] + "/p.safetensors")
combine(made), prefix_curve(made), score_predictions(made), uncertainty(made), uncertainty_quality(made)
recipe = fit_temperature(made, fit_weights(made))
for rule in RULES:
    recipe = fit_cascade(made, tolerance=1.0, rule=rule, recipe=recipe)
    run_cascade(made, recipe)
recipe.save(sys.argv[1] + "/recipe.json")
Recipe.open(sys.argv[1] + "/recipe.json").apply(made), select(made)
correlation(made), disagreement(made), double_fault(made), ambiguity(made), weight_distance([{"w": p}])
perplexity(p[0], made.labels), crps([0.0], [1.0], [0.0]), gaussian_nll([0.0], [1.0], [0.0]), rmse([1.0], [0.0])
auroc([0.0, 1.0], [0, 1]), risk_coverage([0.0], [1.0])
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_what_members_are_worth_is_computed_without_a_framework_and_without_scipy(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", "-c", WORTH, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not {*FRAMEWORKS, "scipy", "sklearn"} & set(done.stdout.split())


@pytest.mark.parametrize("room", ["snapcore", "snapcore.store"])
def test_every_public_name_that_is_announced_is_there_and_announced_once(room):
    module = importlib.import_module(room)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(set(module.__all__)) == len(module.__all__)
