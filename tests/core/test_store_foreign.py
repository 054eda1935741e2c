"""A run deletes and replaces its own files only, and follows no link out of its directory."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store import ResumePoint, SnapshotStore, map_tensors, read_point

from .test_resume import state

TENSORS = {"w": np.arange(3.0)}


def save(store, index):
    return store.save(TENSORS, index=index, step=10 * index, cycle=index - 1, lr=0.1, framework="numpy")


def whole_life(directory):
    """Everything that a run ever does to a directory, and a second one that finds what the first has left."""
    with SnapshotStore(directory, "w") as store:
        save(store, 1)
        store.write_point(ResumePoint(TENSORS, state()))
        save(store, 2)
        store.truncate(1)
    with SnapshotStore(directory, "w") as store:
        save(store, 2)
        store.write_point(ResumePoint(TENSORS, state()))
        store.describe(stopped="finished")
        store.clear_point()


def listing(directory):
    return {
        str(path.relative_to(directory)): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in directory.rglob("*")
    }


MINE = [
    ".tmp",
    ".tmpfile",
    ".tmpAbC123",
    ".tmp-notes",
    ".tmp-thesis.tex-0123abcd",
    ".tmp-snapshot.safetensors-0123abcd",
    ".tmp-snapshot-001.safetensors-0123ABCD",
    ".tmp-snapshot-001.safetensors-0123abcd.bak",
    ".tmp-snapcore.json-0123abc",
    "snapshot-final.safetensors",
    "snapshot-1.safetensors",
    "snapshot-099.safetensors.bak",
    "old-snapshot-001.safetensors",
    "snapcore.json.orig",
    "weights.safetensors",
    ".locked",
    "resume/cv.pdf",
    "resume/.tmp-draft",
    "resume/point.safetensors.old",
    "resume/.tmp-point.txt-0123abcd",
    "data/snapshot-001.safetensors",
    "data/.tmp-snapcore.json-0123abcd",
]


@pytest.mark.parametrize("kind", ["files", "directories", "links"])
def test_a_users_own_files_are_left_as_they_were(tmp_path, kind):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    for name in MINE:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        if kind == "files":
            (run / name).write_text("mine")
        elif kind == "directories":
            (run / name).mkdir()
            (run / name / "mine").write_text("mine")
        else:
            (run / name).symlink_to(elsewhere)
    before = listing(run)
    whole_life(run)
    after = listing(run)
    ours = {".lock", "snapcore.json", "snapshot-001.safetensors", "snapshot-002.safetensors"}
    assert {name: what for name, what in after.items() if name not in ours} == before
    assert ours <= after.keys()
    assert elsewhere.read_text() == "mine"


def test_a_folder_that_was_the_users_is_left_if_anything_is_in_it(tmp_path):
    (tmp_path / "resume" / "empty").mkdir(parents=True)
    whole_life(tmp_path)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["empty"]


@pytest.mark.parametrize(
    "name", ["job.json", "history.csv", "results.json", "snapcore.json", "snapshot-1000.safetensors"]
)
def test_what_a_killed_writer_of_ours_has_left_is_deleted(tmp_path, name):
    (tmp_path / f".tmp-{name}-0123abcd").write_bytes(b"half")
    SnapshotStore(tmp_path, "w").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "snapcore.json"]


@pytest.mark.parametrize("found", [b"mine", b"", None])
def test_a_file_that_has_a_members_name_and_is_none_of_this_run_is_not_overwritten(tmp_path, found):
    with SnapshotStore(tmp_path / "other", "w") as store:
        save(store, 2)
    other = (tmp_path / "other" / "snapshot-002.safetensors").read_bytes()  # a member, but of another number
    with SnapshotStore(tmp_path / "run", "w") as store:
        path = tmp_path / "run" / "snapshot-001.safetensors"
        path.write_bytes(other if found is None else found)
        with pytest.raises(StoreError, match=r"snapshot-001\.safetensors is not a file of this run.*move it away"):
            save(store, 1)
        assert path.read_bytes() == (other if found is None else found)
        path.unlink()
        save(store, 1)
    SnapshotStore(tmp_path / "run").verify()


@pytest.mark.parametrize("found", [b"mine", b"", None])
def test_a_file_that_has_a_points_name_and_is_none_is_not_overwritten(tmp_path, found):
    path = tmp_path / "resume" / "point.safetensors"
    path.parent.mkdir()
    path.write_bytes(found) if found is not None else save_file(TENSORS, path)
    before = path.read_bytes()
    with SnapshotStore(tmp_path, "w") as store:
        with pytest.raises(StoreError, match=r"point\.safetensors is not a file of this run.*move it away"):
            store.write_point(ResumePoint(TENSORS, state()))
        assert path.read_bytes() == before
        path.unlink()
        store.write_point(ResumePoint(TENSORS, state()))


@pytest.mark.parametrize("name", ["snapshot-001.safetensors", "snapcore.json", "resume/point.safetensors"])
def test_a_directory_in_place_of_a_file_is_refused_by_name_and_left(tmp_path, name):
    with SnapshotStore(tmp_path, "w") as store:
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir(parents=True)
        write = {
            "snapcore.json": lambda: store.describe(stopped="finished"),
            "snapshot-001.safetensors": lambda: save(store, 1),
            "resume/point.safetensors": lambda: store.write_point(ResumePoint({}, state())),
        }
        with pytest.raises(StoreError, match=re.escape(str(tmp_path / name))):
            write[name]()
    assert (tmp_path / name).is_dir()


# ------------------------------------------------------------------------------------------------ links


@pytest.fixture
def run(tmp_path):
    """A run whose files are links into a folder of blobs, as the caches of model hubs keep them."""
    run, blobs = tmp_path / "run", tmp_path / "blobs"
    with SnapshotStore(run, "w") as store:
        save(store, 1)
        save(store, 2)
        store.write_point(ResumePoint({"moment": np.ones(2)}, state()))
    blobs.mkdir()
    return run


def link(path, blobs):
    """Move a file or folder away, and leave a link to it."""
    path.rename(blobs / path.name)
    path.symlink_to(blobs / path.name)
    return blobs / path.name


LINKED = [".lock", "snapcore.json", "snapshot-001.safetensors", "resume", "resume/point.safetensors"]


@pytest.mark.parametrize("name", LINKED)
def test_a_run_with_a_link_for_a_file_is_not_opened_to_write(run, name):
    link(run / name, run.parent / "blobs")
    before = listing(run.parent)
    with pytest.raises(StoreError, match=re.escape(f"{run / name} is a link")):
        SnapshotStore(run, "w")
    assert listing(run.parent) == before


@pytest.mark.parametrize("name", [*LINKED, "snapshot-003.safetensors"])
def test_a_link_that_appears_while_a_run_writes_is_not_followed_and_not_replaced(run, name):
    store = SnapshotStore(run, "w")
    (run / name).touch()
    blob = link(run / name, run.parent / "blobs")
    before = listing(blob) if blob.is_dir() else blob.read_bytes()
    writes = {
        "snapcore.json": [lambda: store.describe(stopped="finished")],
        "snapshot-001.safetensors": [lambda: store.load(1), lambda: store.file(1), lambda: store.load(1, verify=False)],
        "snapshot-003.safetensors": [lambda: save(store, 3)],
        ".lock": [lambda: save(store, 3)],
    }
    for write in writes.get(name, [lambda: store.write_point(ResumePoint({}, state())), store.read_point]):
        with pytest.raises(StoreError, match=re.escape(f"{run / name} is a link") if name != ".lock" else "was moved"):
            write()
    assert (listing(blob) if blob.is_dir() else blob.read_bytes()) == before
    assert (run / name).is_symlink()
    store.close()


def test_clearing_a_point_behind_a_linked_folder_is_refused(run):
    with SnapshotStore(run, "w") as store:
        blob = link(run / "resume", run.parent / "blobs")
        with pytest.raises(StoreError, match="resume is a link"):
            store.clear_point()
    assert [path.name for path in blob.iterdir()] == ["point.safetensors"]


def test_a_run_whose_files_are_links_to_blobs_is_read(run):
    saved = {index: SnapshotStore(run).load(index)["w"].tolist() for index in (1, 2)}
    for name in ("snapcore.json", "snapshot-001.safetensors", "snapshot-002.safetensors"):
        link(run / name, run.parent / "blobs")
    reader = SnapshotStore(run)
    reader.verify()
    for index, values in saved.items():
        for loaded in (
            reader.load(index),
            reader.load(index, verify=False),
            map_tensors(reader.file(index)),
            map_tensors(reader.file(index, verify=False), copy=True),
        ):
            assert loaded["w"].tolist() == values


def test_what_a_link_leads_to_is_compared_with_its_digest_in_every_case(run):
    blob = link(run / "snapshot-001.safetensors", run.parent / "blobs")
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    reader = SnapshotStore(run)
    for read in (
        lambda: reader.load(1),
        lambda: reader.load(1, verify=False),
        lambda: reader.file(1),
        lambda: reader.file(1, verify=False),
    ):
        with pytest.raises(CorruptSnapshotError, match=r"snapshot-001\.safetensors does not have the SHA-256"):
            read()


@pytest.mark.parametrize("target", ["/etc/hostname", "/dev/zero", "nowhere", "snapshot-001.safetensors", "."])
def test_a_link_to_anything_but_the_members_file_is_refused(run, target):
    (run / "snapshot-001.safetensors").unlink()
    (run / "snapshot-001.safetensors").symlink_to(target)
    for verify in (True, False):
        with pytest.raises(StoreError, match=r"snapshot-001\.safetensors"):
            SnapshotStore(run).load(1, verify=verify)


def test_a_resume_point_behind_a_link_is_not_read(run):
    for name in ("resume/point.safetensors", "resume"):
        link(run / name, run.parent / "blobs")
        with pytest.raises(StoreError, match=re.escape(f"{run / name} is a link")):
            read_point(run)


def test_a_run_directory_that_is_itself_a_link_is_written_and_read(run):
    (run.parent / "link").symlink_to(run)
    with SnapshotStore(run.parent / "link", "w") as store:
        save(store, 3)
        store.clear_point()
    assert [member.index for member in SnapshotStore(run).members] == [1, 2, 3]
