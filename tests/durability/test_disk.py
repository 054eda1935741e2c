"""Disks that are full, fail or cannot be written: one plain line, no member lost, and the same command goes on."""

import re

import pytest

from snapcore.store import SnapshotStore

from .conftest import REFUSED
from .harness import Fault, arguments, assert_same, finished
from .sabotage import ROOM

WRITE, SAVE_HISTORY = "snapcore.store.directory:SnapshotStore.put", "snapcore.lab.history:History.write"
MEMBER_3 = r"snapshot-003\.safetensors could not be written, which needs \d+ bytes"
POINT = r"point\.safetensors could not be written, which needs \d+ bytes"
MANIFEST = r"snapcore\.json could not be written, which needs \d+ bytes"
FULL = "File too large"  # what a limit on the size of files says, which no one can be exempt from
FAILED = "Input/output error"

FAULTS = {
    "full in the middle of member 3": (Fault(WRITE, "FULL", count=3), f"{MEMBER_3}: .*{FULL}"),
    "full in the middle of a resume point": (
        Fault("snapcore.store.directory:SnapshotStore.write_point", "FULL", count=10),
        f"{POINT}: .*{FULL}",
    ),
    "failing as member 3 is flushed": (Fault("os:fsync", "EIO", match="snapshot-003"), f"{MEMBER_3}: .*{FAILED}"),
    "failing as member 3 is renamed": (Fault("os:replace", "EIO", match="snapshot-003"), f"{MEMBER_3}: .*{FAILED}"),
    "failing as a resume point is flushed": (Fault("os:fsync", "EIO", match="point", count=10), f"{POINT}: .*{FAILED}"),
    "failing as a resume point is renamed": (
        Fault("os:replace", "EIO", match="point", count=10),
        f"{POINT}: .*{FAILED}",
    ),
    "full as member 3 enters the manifest": (
        Fault("os:fsync", "ENOSPC", match="snapcore.json", count=5),
        f"{MANIFEST}: .*No space left",
    ),
    "failing as the manifest with member 3 is renamed": (
        Fault("os:replace", "EIO", match="snapcore.json", count=5),
        f"{MANIFEST}: .*{FAILED}",
    ),
    "full as history.csv is renamed": (
        Fault("os:replace", "ENOSPC", match="history.csv"),
        r"history\.csv cannot be written: .*No space left",
    ),
    "read-only from member 3 on": (
        Fault("os:open", "EROFS", match="snapshot-003", always=True),
        f"{MEMBER_3}: .*Read-only file system",
    ),
}


def assert_whole(directory, undisturbed):
    """Members 1 and 2 are there, and are those of the undisturbed run."""
    store = SnapshotStore(directory)
    store.verify()
    assert [member.index for member in store.members] in ([1, 2], [])
    for member in store.members:
        assert (directory / member.file).read_bytes() == (undisturbed / member.file).read_bytes()
        assert (directory / member.file).stat().st_size > ROOM


@pytest.mark.exhaustive(keep=3)
@pytest.mark.parametrize("name", FAULTS)
def test_a_disk_that_refuses_stops_the_command_with_one_line_and_the_same_command_goes_on(
    zygote, reference, tmp_path, note, name
):
    directory, (fault, message) = tmp_path / "run", FAULTS[name]
    child = zygote.start(directory, fault=fault)
    assert child.wait() == 1
    assert re.search(f"snapcore: {re.escape(str(directory))}/.*{message}", child.output.splitlines()[-1])
    assert "Traceback" not in child.output
    assert_whole(directory, reference().directory)
    assert not list(directory.rglob(".tmp*"))
    finished(zygote.start(directory))
    note(REFUSED, name, refusals=1)
    assert_same(directory, reference().directory)


def test_a_read_only_directory_is_refused_before_anything_is_trained(zygote, tmp_path):
    child = zygote.start(tmp_path / "run", fault=Fault("os:open", "EROFS", match="/run", always=True))
    assert child.wait() == 1
    assert re.fullmatch(
        r"snapcore: .*/run cannot be written: .*Read-only file system.*; choose another.*\n", child.output
    )


def test_a_file_in_the_place_of_the_directory_is_refused_and_left_alone(zygote, tmp_path):
    (tmp_path / "run").write_text("mine")
    for directory in (tmp_path / "run", tmp_path / "run" / "below"):
        child = zygote.command(arguments(directory), tmp_path / "other")
        assert child.wait() == 1
    assert (tmp_path / "run").read_text() == "mine"
    said = child.output.splitlines()
    assert len(said) == 2
    assert all("cannot be written" in line for line in said)


def test_a_file_in_the_place_of_the_resume_points_stops_the_command(zygote, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "resume").write_text("mine")
    child = zygote.start(directory)
    assert child.wait() == 1
    assert "resume/point.safetensors could not be written" in child.output
    assert (directory / "resume").read_text() == "mine"
