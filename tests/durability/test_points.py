"""The command ends at a point that has a name, started again it ends as the undisturbed run.

Members are taken after 20, 40 and 60 updates, resume points written after 5, 10, …, 55; the manifest is written when
the run begins, when it is described, and with every member.
"""

import signal

import pytest

from .conftest import AT_POINT
from .harness import EVERY, METHODS, Fault, assert_same, finished

PUT, ADD, RENAME = (
    "snapcore.store.directory:SnapshotStore.put",
    "snapcore.store.directory:SnapshotStore.add",
    "os:replace",
)
SAVE_HISTORY, CLEAR = "snapcore.lab.history:History.write", "snapcore.store.directory:SnapshotStore.clear_point"
MID_CYCLE, CYCLE_END = 30 // EVERY, 40 // EVERY  # which resume point

POINTS = {
    "job.json, before its rename": Fault(RENAME, match="job.json"),
    "between job.json and the manifest": Fault("snapcore.store.directory:SnapshotStore._write"),
    "first manifest, before its rename": Fault(RENAME, match="snapcore.json"),
    "between the first manifest and the program in it": Fault(RENAME, match="snapcore.json", after=True),
    "member, between capture and file": Fault(PUT, count=2),
    "member, written and not flushed": Fault("os:fsync", match="snapshot-002"),
    "member, before its rename": Fault(RENAME, match="snapshot-002"),
    "member, after its rename": Fault(RENAME, match="snapshot-002", after=True),
    "member, between file and resume point": Fault(PUT, count=2, after=True),
    "resume point at a cycle's end, before its rename": Fault(RENAME, match="point.safetensors", count=CYCLE_END),
    "resume point at a cycle's end, after its rename": Fault(
        RENAME, match="point.safetensors", count=CYCLE_END, after=True
    ),
    "resume point in a cycle, before its rename": Fault(RENAME, match="point.safetensors", count=MID_CYCLE),
    "resume point in a cycle, after its rename": Fault(RENAME, match="point.safetensors", count=MID_CYCLE, after=True),
    "between resume point and manifest": Fault(ADD, count=2),
    "manifest with a member, before its rename": Fault(RENAME, match="snapcore.json", count=4),
    "manifest with a member, after its rename": Fault(RENAME, match="snapcore.json", count=4, after=True),
    "history.csv, before it is written": Fault(SAVE_HISTORY, count=MID_CYCLE),
    "history.csv, between it and its resume point": Fault(SAVE_HISTORY, count=MID_CYCLE, after=True),
    "last member, between file and manifest": Fault(ADD, count=3),
    "between the last manifest and clearing the resume point": Fault(CLEAR),
    "while the resume point is cleared": Fault("os:rmdir", match="resume"),
    "between the last manifest and results.json": Fault(CLEAR, after=True),
    "results.json, before its rename": Fault(RENAME, match="results.json"),
}
WITH_METHOD = [(name, METHODS[place % len(METHODS)]) for place, name in enumerate(POINTS)]


@pytest.mark.exhaustive(keep=6)
@pytest.mark.parametrize(("name", "method"), WITH_METHOD)
def test_a_run_killed_at_a_named_point_ends_as_the_undisturbed_one(zygote, reference, tmp_path, note, name, method):
    directory = tmp_path / "run"
    child = zygote.start(directory, method, fault=POINTS[name])
    assert child.wait() == -signal.SIGKILL, child.output
    finished(zygote.start(directory, method))
    note(AT_POINT, name, kills=1)
    assert_same(directory, reference(method).directory)


def test_a_run_killed_where_it_takes_up_the_member_that_its_manifest_lacks_ends_as_the_undisturbed_one(
    zygote, reference, tmp_path
):
    directory = tmp_path / "run"
    for fault in (Fault(ADD, count=2), Fault(ADD), Fault(ADD, after=True)):
        assert zygote.start(directory, fault=fault).wait() == -signal.SIGKILL
    finished(zygote.start(directory))
    assert_same(directory, reference().directory)
