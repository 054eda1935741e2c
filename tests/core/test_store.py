"""What a run directory promises: what is saved comes back, bit for bit, and nothing is overwritten."""

import hashlib
import json
import os
import stat

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors import safe_open
from safetensors.numpy import load_file

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store import Member, SnapshotStore, move_aside, new_member, seal

BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = [BF16, *map(np.dtype, ["?", "c8", ">f4", ">i2", ">u8", *np.typecodes["AllInteger"], "f2", "f4", "f8"])]
LAYOUTS = [
    lambda array: array,
    np.asfortranarray,
    lambda array: array.T,
    lambda array: array[..., ::-1] if array.ndim else array,
    lambda array: array[::2] if array.ndim else array,
    lambda array: np.broadcast_to(array, (2, *array.shape)),
]


def save(store, index, tensors=None, **fields):
    given = {"step": 10 * index, "cycle": index - 1, "lr": 0.1 / index, "framework": "numpy", **fields}
    return store.save(tensors or {"w": np.arange(6.0).reshape(2, 3) + index}, index=index, **given)


@pytest.fixture
def run(tmp_path):
    with SnapshotStore(tmp_path / "run", "w") as store:
        save(store, 1)
        save(store, 2)
    return tmp_path / "run"


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(TYPES))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    data = draw(st.binary(min_size=(n := int(np.prod(shape)) * dtype.itemsize), max_size=n))
    if dtype.kind == "b":
        data = bytes(byte & 1 for byte in data)
    return draw(st.sampled_from(LAYOUTS))(np.frombuffer(data, dtype).reshape(shape))


def same_bits(found, saved):
    """Compare element by element in C order, as native bytes: the oracle does not use safetensors."""
    native = saved.astype(saved.dtype.newbyteorder("="))
    assert found.dtype == native.dtype
    assert found.shape == saved.shape
    assert found.tobytes("C") == native.tobytes("C")


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), arrays(), min_size=1, max_size=4)
)
def test_arrays_of_every_type_and_layout_come_back_bit_for_bit(tmp_path_factory, tensors):
    directory = tmp_path_factory.mktemp("run")
    with SnapshotStore(directory, "w") as store:
        member = save(store, 1, tensors)
    for loaded in (
        SnapshotStore(directory).load(1),
        SnapshotStore(directory).load(1, verify=False),
        load_file(directory / member.file),
    ):
        assert loaded.keys() == tensors.keys()
        for name, array in loaded.items():
            same_bits(array, tensors[name])


def test_bfloat16_comes_back_as_the_type_of_ml_dtypes(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        save(store, 1, {"w": np.array([1.5, -2.0], BF16)})
        assert store.load(1)["w"].dtype == BF16
        assert store.load(1)["w"].tolist() == [1.5, -2.0]


def test_python_numbers_and_lists_are_arrays_too(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        save(store, 1, {"scalar": 2.5, "list": [[1, 2]]})
        assert store.load(1)["scalar"].shape == ()
        assert store.load(1)["list"].tolist() == [[1, 2]]


def test_verified_arrays_are_in_memory_and_writable(run):
    array = SnapshotStore(run).load(1)["w"]
    assert array.flags.owndata
    assert array.flags.writeable
    array += 1
    assert SnapshotStore(run).load(1)["w"][0, 0] == 1


def test_unverified_arrays_are_mapped_and_read_only(run):
    array = SnapshotStore(run).load(1, verify=False)["w"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array += 1


def test_a_member_is_written_as_described(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        member = save(
            store,
            7,
            step=np.int64(70),
            due=np.int32(65),
            lr=np.float32(0.5),
            unfinished=True,
            metrics={"nll": np.float32(2)},
        )
        digest = hashlib.sha256((tmp_path / "snapshot-007.safetensors").read_bytes()).hexdigest()
        assert member == Member(
            7, "snapshot-007.safetensors", digest, 70, 65, 6, 0.5, "numpy", unfinished=True, metrics={"nll": 2.0}
        )
        assert store.members == (member,)
    assert SnapshotStore(tmp_path).members == (member,)


def test_a_member_is_on_time_unless_said_otherwise(run):
    assert [(member.step, member.due, member.unfinished) for member in SnapshotStore(run).members] == [
        (10, 10, False),
        (20, 20, False),
    ]


def test_members_are_listed_by_index_whatever_the_order_of_saving(tmp_path):
    with SnapshotStore(tmp_path, "w") as store:
        for index in (3, 1, 1000, 2):
            save(store, index)
        assert [member.index for member in store.members] == [1, 2, 3, 1000]
    assert [member.file for member in SnapshotStore(tmp_path).members][-1] == "snapshot-1000.safetensors"


def test_members_are_sorted_when_the_manifest_is_not(run):
    manifest = json.loads((run / "snapcore.json").read_text())
    manifest["members"].reverse()
    del manifest["sha256"]
    (run / "snapcore.json").write_bytes(seal(manifest))
    assert [member.index for member in SnapshotStore(run).members] == [1, 2]


def test_the_manifest_is_plain_indented_json(run):
    text = (run / "snapcore.json").read_text()
    manifest = json.loads(text)
    assert list(manifest) == ["format", "program", "stopped", "members", "sha256"]
    assert manifest["format"] == 1
    assert tuple(manifest["members"][0]) == Member.__struct_fields__
    assert '\n  "members"' in text


def test_a_file_repeats_its_entry_without_the_digest(run):
    entry = json.loads((run / "snapcore.json").read_text())["members"][1]
    with safe_open(run / entry["file"], framework="np") as file:
        metadata = file.metadata()
    assert list(metadata) == ["snapcore"]
    del entry["sha256"]
    assert json.loads(metadata["snapcore"]) == entry


def test_files_have_the_mode_that_any_new_file_gets(tmp_path):
    before = os.umask(0o027)
    try:
        with SnapshotStore(tmp_path / "run", "w") as store:
            save(store, 1)
    finally:
        os.umask(before)
    for name in ("snapcore.json", "snapshot-001.safetensors"):
        assert stat.S_IMODE((tmp_path / "run" / name).stat().st_mode) == 0o640


def test_nothing_but_the_run_is_left_in_the_directory(run):
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "snapcore.json",
        "snapshot-001.safetensors",
        "snapshot-002.safetensors",
    ]


def test_an_index_that_is_there_is_refused_and_its_file_untouched(run):
    before = (run / "snapshot-002.safetensors").read_bytes()
    with SnapshotStore(run, "w") as store:
        with pytest.raises(StoreError, match=r"has member 2; nothing is overwritten"):
            save(store, 2, {"w": np.zeros(1)})
        assert len(store.members) == 2
    assert (run / "snapshot-002.safetensors").read_bytes() == before


def test_writing_resumes_where_an_earlier_writer_ended(run):
    with SnapshotStore(run, "w") as store:
        save(store, 3)
    assert [member.index for member in SnapshotStore(run).members] == [1, 2, 3]
    SnapshotStore(run).verify()


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({}, "at least one tensor"),
        ({3: np.zeros(1)}, "got 3"),
        ({"__metadata__": np.zeros(1)}, "__metadata__"),
        ({"a\ud800": np.zeros(1)}, r"a\\ud800"),
        ({"bad": np.zeros(1, np.complex128)}, "'bad'.*complex128"),
        ({"bad": np.array(["text"])}, "'bad'.*<U4"),
        ({"bad": np.array([None])}, "'bad'.*object"),
        ({"bad": np.zeros(1, ml_dtypes.float8_e4m3fn)}, "'bad'.*float8_e4m3fn"),
        ({"bad": np.zeros(1, "i4,f4")}, "'bad'"),
        ({"bad": [[1], [2, 3]]}, "'bad' must be an array, got list"),
    ],
)
def test_tensors_that_could_not_be_read_back_are_refused_by_name(run, tensors, named):
    with SnapshotStore(run, "w") as store, pytest.raises(StoreError, match=named):
        store.save(tensors, index=3, step=30, cycle=2, lr=0.1, framework="numpy")
    assert not (run / "snapshot-003.safetensors").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"index": 0},
        {"index": "1"},
        {"step": -1},
        {"step": 1.5},
        {"step": 2**31},
        {"due": 10**15},
        {"cycle": 2**63},
        {"index": 10**6 + 1},
        {"due": -1},
        {"cycle": -1},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": "fast"},
        {"lr": 10**400},
        {"framework": None},
        {"framework": "\ud800"},
        {"unfinished": 2},
        {"metrics": {"nll": float("nan")}},
        {"metrics": 3},
    ],
)
def test_values_that_could_not_be_read_back_are_refused(tmp_path, fields):
    with SnapshotStore(tmp_path, "w") as store:
        with pytest.raises(StoreError, match="plain numbers in range"):
            store.save(
                {"w": np.zeros(1)}, **{"index": 1, "step": 1, "cycle": 0, "lr": 0.1, "framework": "numpy"} | fields
            )
        assert store.members == ()
    assert SnapshotStore(tmp_path).members == ()


def test_the_program_and_the_reason_to_stop_are_kept_each_when_given(tmp_path):
    program = {"method": "snapshot", "cycles": 5, "milestones": (0.5, 0.75)}
    with SnapshotStore(tmp_path, "w") as store:
        assert (store.program, store.stopped) == (None, None)
        store.describe(program=program)
        save(store, 1)
        store.describe(stopped="finished")
        store.describe()
    reader = SnapshotStore(tmp_path)
    assert reader.program == store.program == {"method": "snapshot", "cycles": 5, "milestones": [0.5, 0.75]}
    assert reader.stopped == store.stopped == "finished"
    assert len(reader.members) == 1


def test_a_program_given_or_got_can_be_changed_without_changing_the_store(tmp_path):
    program = {"deep": {"a": 1}}
    with SnapshotStore(tmp_path, "w") as store:
        store.describe(program=program)
        program["deep"]["a"] = 2
        store.program["deep"]["a"] = 3
        assert store.program == {"deep": {"a": 1}}


@pytest.mark.parametrize(
    "given",
    [
        {"program": {"lr": float("nan")}},
        {"program": {"lr": np.zeros(1)}},
        {"program": {"text": b"bytes"}},
        {"program": {"name": "\ud800"}},
        {"program": [1]},
        {"stopped": 3},
    ],
)
def test_a_description_that_could_not_be_read_back_is_refused(tmp_path, given):
    with SnapshotStore(tmp_path, "w") as store, pytest.raises(StoreError, match=r"must be"):
        store.describe(**given)
    assert (SnapshotStore(tmp_path).program, SnapshotStore(tmp_path).stopped) == (None, None)


def test_reading_creates_nothing_and_says_what_is_missing(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere holds no run: there is no snapcore\.json"):
        SnapshotStore(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="empty holds no run"):
        SnapshotStore(tmp_path / "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_reading_needs_no_lock_and_leaves_no_trace(run):
    (run / ".lock").unlink()
    SnapshotStore(run).verify()
    assert not (run / ".lock").exists()


def test_parents_are_created_and_an_empty_run_can_be_read(tmp_path):
    with SnapshotStore(tmp_path / "a" / "b" / "run", "w") as store:
        assert SnapshotStore(store.path).members == ()
    assert store.path == tmp_path / "a" / "b" / "run"


def test_a_relative_path_means_the_same_directory_after_a_chdir(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    store = SnapshotStore("run")
    monkeypatch.chdir("/")
    assert store.load(1).keys() == {"w"}


def test_only_two_modes_exist(tmp_path):
    with pytest.raises(StoreError, match="mode must be 'r' or 'w', got 'a'"):
        SnapshotStore(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_reads_or_is_closed_does_not_write(run):
    reader = SnapshotStore(run)
    writer = SnapshotStore(run, "w")
    writer.close()
    writer.close()
    for store in (reader, writer):
        with pytest.raises(StoreError, match="mode='w'"):
            save(store, 3)
        with pytest.raises(StoreError, match="mode='w'"):
            store.describe(stopped="finished")
        assert store.load(2).keys() == {"w"}


def test_an_unknown_index_is_answered_with_those_that_are_there(run):
    for ask in (SnapshotStore(run).load, SnapshotStore(run).file):
        with pytest.raises(StoreError, match=r"no member 5; there are \[1, 2\]") as caught:
            ask(5)
        assert not isinstance(caught.value, CorruptSnapshotError)


def test_a_file_is_given_by_its_path(run):
    assert SnapshotStore(run).file(2) == run / "snapshot-002.safetensors"
    assert SnapshotStore(run).file(2, verify=False) == run / "snapshot-002.safetensors"


def test_a_run_is_moved_to_the_first_free_name(run):
    (run.parent / "run.1").mkdir()
    assert move_aside(run) == run.parent / "run.2"
    assert not run.exists()
    SnapshotStore(run.parent / "run.2").verify()
    SnapshotStore(run, "w").close()
    assert move_aside(str(run)) == run.parent / "run.3"


def test_what_is_no_run_is_not_moved(tmp_path):
    with pytest.raises(StoreError, match="holds no run"):
        move_aside(tmp_path)
    assert tmp_path.exists()


@pytest.mark.parametrize("file", ["snapshot-002.safetensors", ".lock", "../snapshot-001.safetensors", ""])
def test_a_member_has_its_own_file_and_no_other(file):
    member = new_member(index=1, step=1, cycle=0, lr=0.1, framework="numpy")
    with pytest.raises(ValueError, match="file must be snapshot-001"):
        msgspec.structs.replace(member, file=file)


def test_more_names_than_a_reader_would_take_are_refused_and_nothing_is_written(tmp_path):
    tensors = {f"{'x' * 2**20}{number}": np.zeros(1) for number in range(33)}
    with SnapshotStore(tmp_path, "w") as store, pytest.raises(StoreError, match="33 tensors are too long for one file"):
        save(store, 1, tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "snapcore.json"]
