"""Which files an ensemble is made of."""

import numpy as np
import pytest

from snapcore import CorruptSnapshotError, DataError, StoreError
from snapcore.ensemble import member_files
from snapcore.store import SnapshotStore


def write(directory, *, finished=3, unfinished=0, framework="numpy"):
    with SnapshotStore(directory, "w") as store:
        for index in range(1, finished + unfinished + 1):
            place = {"index": index, "step": index, "cycle": index - 1, "lr": 0.1, "framework": framework}
            store.save({"w": np.full(3, index)}, **place, unfinished=index > finished)
    return directory


def names(files):
    return [f"{file.parent.name}/{file.name[9:12]}" for file in files]


@pytest.mark.parametrize("last", [None, 1, 2, 3])
def test_the_last_finished_members_come_in_the_order_they_were_taken(tmp_path, last):
    run = write(tmp_path / "a", unfinished=1)
    assert names(member_files(run, framework="numpy", last=last)) == ["a/001", "a/002", "a/003"][-(last or 3) :]


def test_members_of_several_runs_are_counted_in_each(tmp_path):
    runs = [write(tmp_path / "b"), str(write(tmp_path / "a", finished=2))]
    assert names(member_files(runs, framework="numpy", last=2)) == ["b/002", "b/003", "a/001", "a/002"]


def test_a_member_of_another_framework_is_refused_with_the_cure(tmp_path):
    run = write(tmp_path / "a", framework="torch")
    with pytest.raises(DataError, match=r"member 1 of .* by torch, not by jax: load it with snapcore_torch"):
        member_files(run, framework="jax")


def test_a_run_without_a_finished_member_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no finished member"):
        member_files(write(tmp_path / "a", finished=0, unfinished=1), framework="numpy")


@pytest.mark.parametrize("last", [0, -1, 4])
def test_last_must_be_among_the_finished_members(tmp_path, last):
    with pytest.raises(StoreError, match=rf"last must be in 1\.\.3.*got {last}"):
        member_files(write(tmp_path / "a", unfinished=1), framework="numpy", last=last)


def test_a_file_that_was_altered_is_refused_and_one_that_is_not_used_is_not_read(tmp_path):
    run = write(tmp_path / "a")
    (run / "snapshot-002.safetensors").write_bytes(b"?")
    assert names(member_files(run, framework="numpy", last=1)) == ["a/003"]
    with pytest.raises(CorruptSnapshotError, match="snapshot-002"):
        member_files(run, framework="numpy", last=2)
