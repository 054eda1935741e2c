"""What a damaged run directory does: it says which file is damaged, and never gives other numbers.

Damage at random is in tests/durability/test_damage.py.
"""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store import SnapshotStore


@pytest.fixture
def run(tmp_path):
    with SnapshotStore(tmp_path / "run", "w") as store:
        store.describe(program={"method": "snapshot"})
        for index in (1, 2):
            tensors = {"w": np.arange(12, dtype=np.float32) * index, "n": np.array(index)}
            metrics = {"nll": 0.5 * index}
            store.save(
                tensors,
                index=index,
                step=10 * index,
                cycle=index - 1,
                lr=0.1 * index,
                framework="numpy",
                metrics=metrics,
            )
    return tmp_path / "run"


def edit(run, change):
    manifest = json.loads((run / "snapcore.json").read_text())
    change(manifest)
    (run / "snapcore.json").write_text(json.dumps(manifest))


def test_a_missing_file_is_named(run):
    (run / "snapshot-002.safetensors").unlink()
    store = SnapshotStore(run)
    store.load(1)
    for read in (store.verify, lambda: store.load(2), lambda: store.load(2, verify=False)):
        with pytest.raises(CorruptSnapshotError, match=r"snapshot-002\.safetensors is missing"):
            read()


def test_exchanged_files_are_noticed_even_without_the_digest(run):
    one, two = run / "snapshot-001.safetensors", run / "snapshot-002.safetensors"
    one.rename(run / "x")
    two.rename(one)
    (run / "x").rename(two)
    for verify in (True, False):
        with pytest.raises(CorruptSnapshotError, match=r"snapshot-001.*swapped"):
            SnapshotStore(run).load(1, verify=verify)


def test_exchanged_files_are_noticed_when_their_digests_are_exchanged_too(run):
    def swap(manifest):
        one, two = manifest["members"]
        for key in ("file", "sha256"):
            one[key], two[key] = two[key], one[key]

    edit(run, swap)
    with pytest.raises(CorruptSnapshotError, match="does not say of itself what the manifest says"):
        SnapshotStore(run).verify()


def test_a_renamed_file_is_noticed_by_whoever_follows_the_name(run):
    (run / "snapshot-001.safetensors").rename(run / "best.safetensors")
    with pytest.raises(CorruptSnapshotError, match=r"snapshot-001\.safetensors is missing"):
        SnapshotStore(run).load(1)
    edit(run, member("file", "best.safetensors"))
    with pytest.raises(CorruptSnapshotError, match=r"best\.safetensors does not say of itself"):
        SnapshotStore(run).verify()


def test_a_copy_of_one_members_file_under_anothers_name_is_noticed(run):
    (run / "snapshot-002.safetensors").write_bytes((run / "snapshot-001.safetensors").read_bytes())
    for verify in (True, False):
        with pytest.raises(CorruptSnapshotError, match=r"snapshot-002\.safetensors does not say of itself"):
            SnapshotStore(run).load(2, verify=verify)


def test_a_member_duplicated_with_its_entry_and_its_file_is_noticed(run):
    (run / "snapshot-003.safetensors").write_bytes((run / "snapshot-002.safetensors").read_bytes())
    again = {"index": 3, "file": "snapshot-003.safetensors"}
    edit(run, lambda manifest: manifest["members"].append({**manifest["members"][1], **again}))
    with pytest.raises(CorruptSnapshotError, match=r"snapcore\.json does not have the SHA-256"):
        SnapshotStore(run).verify()


def test_an_altered_weight_is_noticed_by_its_digest(run):
    path = run / "snapshot-001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptSnapshotError, match=r"snapshot-001\.safetensors does not have the SHA-256"):
        SnapshotStore(run).load(1)
    SnapshotStore(run).load(1, verify=False)


@pytest.mark.parametrize("text", [None, "", "{", "[" * 10**5, "null"])
def test_a_file_that_snapcore_did_not_write_is_not_a_member(run, text):
    path = run / "snapshot-001.safetensors"
    save_file(load_file(path), path, metadata=None if text is None else {"snapcore": text})
    with pytest.raises(CorruptSnapshotError, match="does not say of itself"):
        SnapshotStore(run).load(1, verify=False)


def test_a_type_that_numpy_lacks_is_refused_by_name(run):
    path = run / "snapshot-001.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F8_E4M3"'))
    size = struct.pack("<Q", struct.unpack("<Q", path.read_bytes()[:8])[0] + 4)
    path.write_bytes((size + path.read_bytes()[8:]).replace(b'"shape":[12]', b'"shape":[48]'))
    with pytest.raises(CorruptSnapshotError, match="F8_E4M3"):
        SnapshotStore(run).load(1, verify=False)


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside", "sub/inside"])
def test_a_link_out_of_the_directory_is_not_followed(run, target):
    path = run / "snapshot-001.safetensors"
    (run / "sub").mkdir()
    for copy in (run.parent / "outside", run / "sub" / "inside"):
        copy.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(target)
    with pytest.raises(CorruptSnapshotError, match="is a link out of the run's directory"):
        SnapshotStore(run).load(1)


def test_a_run_behind_a_link_is_read(run):
    (run.parent / "link").symlink_to(run)
    SnapshotStore(run.parent / "link").verify()


def test_a_named_pipe_is_no_file(run):
    (run / "snapshot-001.safetensors").unlink()
    os.mkfifo(run / "snapshot-001.safetensors")
    with pytest.raises(CorruptSnapshotError, match="is missing"):
        SnapshotStore(run).load(1)


def member(key, value):
    return lambda manifest: manifest["members"][0].update({key: value})


@pytest.mark.parametrize(
    "change",
    [
        *[
            member("file", name)
            for name in (
                *(
                    "",
                    ".",
                    "..",
                    "../x",
                    "/etc/passwd",
                    "a/b",
                    "a\\b",
                    "C:x",
                    "\\\\host\\x",
                    "a\0b",
                    "x/",
                    "snapcore.json",
                ),
                *("snapshot-002.safetensors", 3, None),
            )
        ],
        *[member("index", index) for index in (2, 0, -1, 1.0, "1", True, 2**64)],
        *[member(key, -1) for key in ("step", "due", "cycle")],
        *[member("lr", lr) for lr in (float("nan"), float("inf"), "0.1", None, 10**400)],
        *[member("metrics", metrics) for metrics in ({"nll": float("nan")}, {"nll": "x"}, [])],
        *[member("sha256", digest) for digest in ("", "0" * 63, "G" * 64, "0" * 64 + "\n", None)],
        member("unfinished", 1),
        member("framework", None),
        member("colour", "red"),
        lambda manifest: manifest["members"][0].pop("step"),
        lambda manifest: manifest.update(members={}),
        lambda manifest: manifest.update(members=[[]]),
        lambda manifest: manifest.update(program=[]),
        lambda manifest: manifest.update(stopped=1),
        lambda manifest: manifest.update(surprise=1),
        lambda manifest: manifest.update(format="1"),
        lambda manifest: manifest.update(format=1.5),
        lambda manifest: manifest.pop("format"),
    ],
)
def test_a_manifest_with_an_absurd_value_is_refused(run, change):
    edit(run, change)
    for mode in ("r", "w"):
        with pytest.raises(CorruptSnapshotError, match=r"snapcore\.json is not a manifest"):
            SnapshotStore(run, mode)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\x00",
        b"\xff\xfe",
        b'{"format": 1, "stopped": "\xff"}',
        b'{"format": 1, "stopped": "\\ud800"}',
        b'{"format": 1} {}',
        b'{"format": 1, "program": ' + b'{"a":' * 10**5,
        b'{"format": 1, "other": ' + b"[" * 10**5,
        b'{"format": 1, "members": ' + b"[" * 10**5,
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(run, data):
    (run / "snapcore.json").write_bytes(data)
    with pytest.raises(CorruptSnapshotError, match=r"snapcore\.json is not a manifest"):
        SnapshotStore(run)


@pytest.mark.parametrize("version", [2, 0, 99])
def test_a_later_format_asks_for_an_upgrade_before_anything_else_is_judged(run, version):
    (run / "snapcore.json").write_text(json.dumps({"format": version, "a later field": [], "members": "elsewhere"}))
    with pytest.raises(StoreError, match=f"format {version}, this snapcore reads format 1; upgrade") as caught:
        SnapshotStore(run)
    assert not isinstance(caught.value, CorruptSnapshotError)


def test_a_lost_manifest_is_not_begun_anew_beside_its_members(run):
    (run / "snapcore.json").unlink()
    with pytest.raises(CorruptSnapshotError, match=r"snapcore\.json is missing beside snapshot-001\.safetensors"):
        SnapshotStore(run, "w")
    assert not (run / "snapcore.json").exists()


def test_a_refused_directory_is_not_left_locked(run):
    good = (run / "snapcore.json").read_bytes()
    (run / "snapcore.json").write_bytes(b"{")
    with pytest.raises(CorruptSnapshotError):
        SnapshotStore(run, "w")
    (run / "snapcore.json").write_bytes(good)
    SnapshotStore(run, "w").close()


@pytest.mark.parametrize(
    "alter", [lambda text: text.replace('"finished"', '"finisheb"'), lambda text: text.replace("0.25", "0.75")]
)
def test_what_the_manifest_says_beside_the_members_is_guarded_by_its_own_digest(tmp_path, alter):
    with SnapshotStore(tmp_path, "w") as store:
        store.save({"w": np.ones(2)}, index=1, step=1, cycle=0, lr=0.1, framework="numpy")
        store.describe(program={"lr": 0.25}, stopped="finished")
        store.verify()
    path = tmp_path / "snapcore.json"
    path.write_text(alter(path.read_text()))
    for ask in (SnapshotStore.verify, lambda store: store.load(1)):
        with pytest.raises(CorruptSnapshotError, match=r"snapcore\.json does not have the SHA-256"):
            ask(SnapshotStore(tmp_path))
