"""Files that carry their own digest: an altered one is refused, whichever fact was altered."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store import SnapshotStore, seal, unseal

TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)
CONTENTS = st.dictionaries(TEXT.filter(lambda key: key != "sha256"), JSON, max_size=4)


@given(CONTENTS)
def test_what_is_sealed_comes_back(content):
    found = unseal(seal(content))
    assert repr(found) == repr(content)  # -0.0 and True are not 0.0 and 1
    assert list(found) == list(content)


@given(CONTENTS)
def test_a_sealed_file_is_plain_json_for_everyone_else(content):
    text = seal(content).decode()
    found = json.loads(text)
    assert len(found.pop("sha256")) == 64
    assert repr(found) == repr(content)
    assert text.endswith("\n}\n")


def test_the_digest_is_that_of_the_json_without_spaces_and_with_an_empty_digest():
    plain = '{"name":"α","values":[1,2.5,null],"sha256":""}'
    expected = hashlib.sha256(plain.encode()).hexdigest()
    assert json.loads(seal({"name": "α", "values": (1, 2.5, None)}))["sha256"] == expected


@given(st.data(), CONTENTS.filter(bool))
def test_an_altered_file_says_what_it_said_or_is_refused(data, content):
    sealed = seal(content)
    position = data.draw(st.integers(0, len(sealed) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != sealed[position]))
    try:
        found = unseal(sealed[:position] + bytes([byte]) + sealed[position + 1 :], "job.json")
    except CorruptSnapshotError as error:
        assert str(error).startswith("job.json is not as it was written: ")  # noqa: PT017  spaces may be altered
    else:
        assert repr(found) == repr(content)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.ones(2), {1}, b"bytes", "\ud800", [object()]])
def test_what_is_not_plain_json_is_not_sealed(value):
    with pytest.raises(StoreError, match="a sealed file must be plain JSON"):
        seal({"value": value})


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"{}", b'{"seed": 7}', b'{"seed": 7, "sha256": ""}', b"\xff", b"[" * 10**5],
    ids=range(8),
)
def test_what_was_never_sealed_is_refused(data):
    with pytest.raises(CorruptSnapshotError, match="it is not as it was written"):
        unseal(data)


# ------------------------------------------------------------------------------------------------ the manifest


@pytest.fixture
def run(tmp_path):
    with SnapshotStore(tmp_path / "run", "w") as store:
        store.describe(program={"lr": 0.25, "nested": {"cycles": [1, 2]}}, stopped="finished")
        for index in (1, 2):
            fields = {"step": 20 * index, "cycle": index - 1, "lr": 0.001, "framework": "torch"}
            store.save({"w": np.ones(3, np.float32)}, index=index, metrics={"error": 1.5}, **fields)
    return tmp_path / "run"


def facts(run):
    store = SnapshotStore(run)
    return repr((store.program, store.stopped, store.members))


def test_every_character_of_a_manifest_is_guarded_when_it_is_opened_to_read_and_to_write(run):
    path, truth = run / "snapcore.json", facts(run)
    good, refused = path.read_bytes(), 0
    for position, byte in enumerate(good):
        path.write_bytes(good[:position] + bytes([byte ^ (1, 2, 0x20)[position % 3]]) + good[position + 1 :])
        try:
            assert facts(run) == truth
        except StoreError:
            refused += 1
            with pytest.raises(StoreError):
                SnapshotStore(run, "w")
    assert refused > len(good) / 2  # the others are spaces
    path.write_bytes(good)
    SnapshotStore(run, "w").close()


@pytest.mark.parametrize(
    "alter",
    [
        lambda manifest: manifest.update(stopped=None),
        lambda manifest: manifest["program"].update(lr=0.5),
        lambda manifest: manifest["members"].pop(),
        lambda manifest: manifest["members"].reverse(),
        lambda manifest: manifest["members"][0].update(lr=0.002),
        lambda manifest: manifest["members"][0].update(unfinished=True),
        lambda manifest: manifest["members"][0].update(metrics=None),
        lambda manifest: manifest.update(sha256=""),
        lambda manifest: manifest.update(sha256="0" * 64),
        lambda manifest: manifest.update(sha256=None),
        lambda manifest: manifest.pop("sha256"),
    ],
)
@pytest.mark.parametrize("mode", ["r", "w"])
def test_a_manifest_with_another_fact_or_without_its_digest_is_refused(run, alter, mode):
    manifest = json.loads((run / "snapcore.json").read_text())
    alter(manifest)
    (run / "snapcore.json").write_text(json.dumps(manifest, indent=2))
    with pytest.raises(CorruptSnapshotError, match=r"snapcore\.json is not a manifest.* SHA-256.*was altered"):
        SnapshotStore(run, mode)


def test_white_space_and_the_order_of_nothing_else_may_change(run):
    truth = facts(run)
    manifest = json.loads((run / "snapcore.json").read_text())
    for text in (json.dumps(manifest), json.dumps(manifest, indent="\t").replace("\n", "\r\n")):
        (run / "snapcore.json").write_text(text)
        assert facts(run) == truth
