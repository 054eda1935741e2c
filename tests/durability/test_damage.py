"""Files that were damaged at random: each is refused by name, or says what it said before; none gives other numbers.

Chosen damage (members swapped, renamed, duplicated; absurd manifests; links) is in tests/core/test_store_damage.py.
"""

import hashlib
import os
import random
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.run import random_state
from snapcore.store import ResumePoint, SnapshotStore, read_point

from .conftest import DAMAGED
from .harness import MANIFEST, POINT, Fault, assert_same, finished

DAMAGE = int(os.environ.get("SNAPCORE_DAMAGE", "1000"))
MEMBER = "snapshot-001.safetensors"
FILES = {MANIFEST: "manifest", MEMBER: "member", str(POINT): "resume point"}
RANDOM = {**random_state(), "framework": None}
IN_CYCLE_2 = Fault("snapcore.store.directory:SnapshotStore.write_point", count=6)


@pytest.fixture
def run(tmp_path):
    """Two members, and a resume point with and without a member."""
    path, rng = tmp_path / "run", np.random.default_rng(0)
    with SnapshotStore(path, "w") as store:
        store.describe(program={"method": "snapshot"})
        for index in (1, 2):
            tensors = {"w": rng.normal(size=(3, 4)).astype(np.float32), "n": np.array(index)}
            fields = {"index": index, "step": 10 * index, "cycle": index - 1, "lr": 0.1 / index}
            member = store.save(tensors, framework="numpy", metrics={"nll": 0.5 * index}, **fields)
        process = {"random": RANDOM, "data": {"epoch": 1, "batches": 3, "random": None}}
        place = {"step": 20, "taken": 2, "last": 20, "stopped": None}
        state = {"framework": "numpy", "place": place, "values": {"a": [1.5]}, "processes": [process]}
        store.write_point(ResumePoint({"m/0": rng.normal(size=12)}, state, member))
    return path


def everything(run):
    """Read all that a run has to say, as plain comparable values."""
    store = SnapshotStore(run)
    store.verify()
    point = read_point(run)
    return (
        store.program,
        store.members,
        [bits(store.load(m.index)) for m in store.members],
        bits(point.tensors),
        (
            point.state,
            point.member,
        ),
    )


def bits(tensors):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tensors.items()}


def flipped(data, rng):
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ rng.randrange(1, 256)]) + data[position + 1 :]


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


@pytest.mark.parametrize("damage", [flipped, truncated])
@pytest.mark.parametrize("name", FILES)
def test_a_file_damaged_at_random_is_refused_or_says_what_it_said(run, note, name, damage):
    """Harmless is a space of JSON that became another: a manifest has many, the header of a file of tensors a few."""
    rng, path, truth = random.Random(name), run / name, everything(run)
    whole, times, refused = path.read_bytes(), DAMAGE // 6 + 1, 0
    for _ in range(times):
        path.write_bytes(damage(whole, rng))
        try:
            found = everything(run)
        except StoreError as error:
            found, refused = str(error), refused + 1
        assert (str(run) in found) if isinstance(found, str) else (found == truth)
    note(DAMAGED, f"{FILES[name]} {damage.__name__}", refused=refused, harmless=times - refused)
    assert refused > 0.98 * times or name == MANIFEST


def test_no_damage_to_a_header_crashes_a_reader_that_only_maps(run):
    path, rng = run / MEMBER, random.Random(0)
    whole = path.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(DAMAGE // 2):
        path.write_bytes(flipped(whole[:length], rng) + whole[length:])
        try:
            tensors = SnapshotStore(run).load(1, verify=False)
        except CorruptSnapshotError:
            continue
        else:
            assert sum(array.nbytes for array in tensors.values()) == len(whole) - length


@pytest.mark.parametrize("text", ["null", "[]", '{"format": 1}', "[" * 10**5, '{"format": 1, "state": ' + "[" * 10**5])
def test_a_resume_point_that_has_its_digest_and_no_sense_is_refused(run, text):
    save_file({}, run / POINT, metadata={"snapcore": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    with pytest.raises(CorruptSnapshotError, match=r"point\.safetensors is not what was written"):
        read_point(run)


@pytest.fixture(scope="module")
def killed(zygote, tmp_path_factory):
    """A run that was killed in its second cycle."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    zygote.start(directory, fault=IN_CYCLE_2).wait()
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def altered(data):
    return data[:-2] + bytes([data[-2] ^ 64]) + data[-1:]  # a bracket, or a number


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("name", [*FILES, "job.json"])
def test_the_command_names_a_damaged_file_in_one_line_and_goes_on_once_it_is_restored(
    zygote, reference, tmp_path, killed, name
):
    directory = tmp_path / "run"
    for path, content in killed.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(altered(whole))
    child = zygote.start(directory)
    assert child.wait() == 1
    assert "Traceback" not in child.output
    assert f"snapcore: {directory / name} " in child.output.splitlines()[-1]
    (directory / name).write_bytes(whole)
    finished(zygote.start(directory))
    assert_same(directory, reference().directory)
