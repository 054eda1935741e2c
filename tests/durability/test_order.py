"""In which order a run flushes, renames and deletes: what a machine that loses its power keeps is always enough."""

import os
import pathlib
import re

import numpy as np
import pytest

from snapcore import CosineCycles
from snapcore.run import Recorder

TEMPORARY = re.compile(r"\.tmp-(.*)-[0-9a-f]{8}")


class Numbers:
    """What is trained: four numbers."""

    fresh = None

    def settings(self):
        return {}

    def capture(self):
        return {"w": np.arange(4.0)}

    def dump(self):
        return {"weights/w": np.arange(4.0), "momentum": np.ones(4)}, {}

    def load(self, tensors, values):
        raise NotImplementedError

    def random_state(self):
        return None


def whole(name):
    return [("flush", name), ("rename", name), ("flush", "resume" if name.startswith("point") else "run")]


@pytest.fixture
def order(monkeypatch):
    found, originals = [], (os.fsync, os.replace, os.rmdir)

    def flush(descriptor):
        name = pathlib.Path(f"/proc/self/fd/{descriptor}").readlink().name
        found.append(("flush", TEMPORARY.sub(r"\1", name)))
        originals[0](descriptor)

    def rename(source, target):
        found.append(("rename", pathlib.Path(target).name))
        originals[1](source, target)

    def delete(path, **options):
        found.append(("delete", pathlib.Path(path).name))
        originals[2](path, **options)

    for name, replacement in (("fsync", flush), ("replace", rename), ("rmdir", delete)):
        monkeypatch.setattr(os, name, replacement)
    return found


def test_a_member_comes_before_the_point_that_names_it_and_the_manifest_after_both(tmp_path, order):
    with Recorder(tmp_path / "run", CosineCycles(0.1, 4, 2), Numbers(), framework="numpy", resume_every=1) as recorder:
        order.clear()
        for _ in range(4):
            recorder.record(1)
    member_1 = [*whole("snapshot-001.safetensors"), *whole("point.safetensors"), *whole("snapcore.json")]
    member_2 = [*whole("snapshot-002.safetensors"), *whole("snapcore.json"), ("delete", "resume")]
    point = whole("point.safetensors")
    assert order == [*point, *member_1, *point, *member_2]
