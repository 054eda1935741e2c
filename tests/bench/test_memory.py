"""How much memory scoring six members of 100 MB takes, beside scoring one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from snapcore.store import SnapshotStore

from .compare import Row

PROBE = Path(__file__).with_name("memory_probe.py")
MEMBERS, LAYERS, WIDTH = 6, 25, 1000
MEMBER_MB = LAYERS * WIDTH * WIDTH * 4 / 1e6


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path, random = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    with SnapshotStore(path, "w") as store:
        for index in range(1, MEMBERS + 1):
            weights = random.standard_normal((LAYERS, WIDTH, WIDTH), dtype=np.float32) / WIDTH**0.5
            tensors = {f"{layer}.weight": weights[layer] for layer in range(LAYERS)}
            store.save(tensors, index=index, step=index, cycle=index - 1, lr=0.1, framework="torch")
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("lazy", "store.load, one at a time, into prefix_curve"), ("whole", "SnapshotEnsemble.load and forward")],
)
def test_scoring_six_members_takes_one_member_more_than_scoring_one(benchmark, table, directory, kind, name):
    one = _peaks(kind, directory, 1)
    six = benchmark.pedantic(_peaks, (kind, directory, MEMBERS), rounds=1)
    for memory, what in (("RssAnon", "private"), ("RssFile", "mapped files")):
        more = six[memory] - one[memory]
        benchmark.extra_info[memory] = {"one": one[memory], "six": six[memory]}
        goal = f"≤ +{MEMBER_MB:.0f} MB and an accumulator" if memory == "RssAnon" else "–"
        mb = [f"{value:.1f} MB" for value in (six[memory], one[memory])]
        table.append(Row(f"{name}: {what}, 6 × 100 MB", mb[0], "1 × 100 MB", mb[1], f"{more:+.1f} MB", goal))


def _peaks(kind: str, directory: Path, members: int) -> dict[str, float]:
    command = [sys.executable, PROBE, kind, directory, str(members)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
