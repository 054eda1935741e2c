"""Which files an ensemble is made of."""

import json

import numpy as np
import pytest

from snapcore import CorruptSnapshotError, DataError, StoreError
from snapcore.ensemble import member_files
from snapcore.store import SnapshotStore


def write(directory, *, finished=3, unfinished=0, framework="numpy"):
    with SnapshotStore(directory, "w") as store:
        for index in range(1, finished + unfinished + 1):
            entry = {"index": index, "step": index, "cycle": index - 1, "lr": 0.1, "framework": framework}
            store.save({"w": np.full(3, index)}, **entry, unfinished=index > finished)
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


def test_members_are_chosen_by_their_indices_in_the_order_asked_for(tmp_path):
    runs = [write(tmp_path / "b", unfinished=1), write(tmp_path / "a")]
    assert names(member_files(runs, framework="numpy", members=[3, 1])) == ["b/003", "b/001", "a/003", "a/001"]
    assert names(member_files(runs[0], framework="numpy", members=iter([4]))) == ["b/004"]  # unfinished, and asked for


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ([], DataError, r"members must be different indices, at least one, got \[\]"),
        ([1, 2, 1], DataError, r"different indices, at least one, got \[1, 2, 1\]"),
        ([1, 7], StoreError, r"members must be among those of .*, \[1, 2, 3\]; got 7"),
        (["1"], StoreError, "got '1'"),
    ],
)
def test_indices_that_there_are_not_are_refused(tmp_path, members, error, message):
    with pytest.raises(error, match=message):
        member_files(write(tmp_path / "a"), framework="numpy", members=members)


def test_last_and_members_exclude_each_other(tmp_path):
    with pytest.raises(DataError, match=r"either last or members must be left out, got last=1 and members=\[2\]"):
        member_files(write(tmp_path / "a"), framework="numpy", last=1, members=[2])


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"?"), lambda file: file.unlink()])
def test_a_damaged_member_is_named_with_what_leaves_it_out_and_then_is_not_read(tmp_path, damage):
    run = write(tmp_path / "a")
    damage(run / "snapshot-002.safetensors")
    with pytest.raises(CorruptSnapshotError, match=r"snapshot-002.* \(members=\[1, 3\] leaves it out\)$"):
        member_files(run, framework="numpy")
    assert names(member_files(run, framework="numpy", members=[1, 3])) == ["a/001", "a/003"]
    with pytest.raises(CorruptSnapshotError) as caught:
        member_files(run, framework="numpy", members=[2])
    assert "members=" not in str(caught.value)  # there is no other


def test_an_altered_manifest_is_not_laid_to_a_member(tmp_path):
    run = write(tmp_path / "a")
    manifest = run / "snapcore.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "stopped": "never"}))
    with pytest.raises(CorruptSnapshotError, match=r"snapcore\.json .* was altered") as caught:
        member_files(run, framework="numpy")
    assert "members=" not in str(caught.value)


def test_other_frameworks_may_be_allowed_and_only_chosen_members_are_asked(tmp_path):
    run = write(tmp_path / "a", framework="torch")
    assert len(member_files(run, framework=("keras", "torch"))) == 3
    with pytest.raises(DataError, match="by torch, not by keras: load it with snapcore_torch"):
        member_files(run, framework=("keras", "jax"))


def test_a_file_that_was_altered_is_refused_and_one_that_is_not_used_is_not_read(tmp_path):
    run = write(tmp_path / "a")
    (run / "snapshot-002.safetensors").write_bytes(b"?")
    assert names(member_files(run, framework="numpy", last=1)) == ["a/003"]
    with pytest.raises(CorruptSnapshotError, match="snapshot-002"):
        member_files(run, framework="numpy", last=2)
