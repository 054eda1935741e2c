"""Files that can tell whether they are as they were written."""

import contextlib
import hashlib
import json
import os
import re
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapcore import CorruptSnapshotError, StoreError
from snapcore.lab.job import Job, load_job
from snapcore.lab.sealed import read_sealed, write_sealed
from snapcore.store import seal

from .conftest import copy_of

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def own_digest(data):
    """The digest as the documentation defines it: of the file without white space, and with `sha256` empty."""
    dense = re.sub(rb'("(?:[^"\\]|\\.)*")|\s+', lambda found: found[1] or b"", data)
    return hashlib.sha256(re.sub(rb'"sha256":"[0-9a-f]{64}"}$', b'"sha256":""}', dense)).hexdigest()


@given(values=st.dictionaries(st.text().filter("sha256".__ne__), plain, max_size=4))
@SETTINGS
def test_what_is_written_is_read_and_bears_the_digest_of_all_the_rest(values, tmp_path):
    write_sealed(tmp_path / "a.json", values)
    assert read_sealed(tmp_path / "a.json") == values
    data = (tmp_path / "a.json").read_bytes()
    assert json.loads(data) == {**values, "sha256": own_digest(data)}


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
@SETTINGS
def test_one_flipped_bit_is_refused_or_changes_no_value(at, bit, tmp_path):
    path, values = tmp_path / "a.json", {"model": "mlp", "lr": 0.1, "members": [1, 2, 3]}
    write_sealed(path, values)
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)
    with contextlib.suppress(CorruptSnapshotError):
        assert read_sealed(path) == values


FORGED = {
    "empty": b"",
    "text": b"hello",
    "a list": b"[]",
    "without a digest": b'{"backend": "torch"}',
    "with another's digest": seal({"a": 1}).replace(b"1", b"2", 1),
    "a digest that is a number": b'{"sha256": 1}',
    "NaN": b'{"lr": NaN, "sha256": ""}',
    "infinity": b'{"lr": 1e999, "sha256": ""}',
    "no UTF-8": b'{"a": "\xff", "sha256": ""}',
    "a number of 10000 digits": b'{"epochs": ' + b"9" * 10000 + b', "sha256": ""}',
    "deep": b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "deep and cut off": b"[" * 10**5,
    "of 10 megabytes": b'{"a": "' + b"a" * 10**7 + b'"}',
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("name", ["job.json", "results.json"])
def test_what_was_not_written_so_is_refused_in_one_line_that_names_the_file(name, content, cli, here, finished):
    run = copy_of(finished, here / "run")
    (run / name).write_bytes(content)
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert str(name) in cli("evaluate", run).refusal
    assert {path: path.read_bytes() for path in run.iterdir()} == before


JOBS = [
    {"epochs": 0},
    {"epochs": "3"},
    {"lr": None},
    {"seed": -1},
    {"more": 1},
    {"backend": 7},
    {"model": []},
    {"data_dir": {}},
    {"cycles": 1.5},
    {"momentum": -1.0},
    {"weight_decay": -1.0},
    {"clip_norm": -1.0},
    {"loss": "hinge"},
    {"task": "values"},
]


@pytest.mark.parametrize("change", JOBS, ids=str)
def test_a_sealed_job_with_values_that_no_command_gives_is_an_error_of_the_tree(change, tmp_path):
    write_sealed(tmp_path / "job.json", {"backend": "torch", **change})
    with pytest.raises(StoreError, match=r"job\.json is damaged"):
        load_job(tmp_path)


VALUES = [
    {"backend": "bogus"},
    {"backend": "torch\x1b[31m"},
    {"data": "no\0name"},
    {"data": "x", "data_dir": "no\0folder"},
    {"data": "x", "data_dir": "a" * 5000},
    {"model": "bogus"},
    {"model": "bogus:"},
    {"optimizer": "bogus"},
    {"precision": "bogus"},
    {"device": "bogus"},
    {"clip_norm": 0.0},
    {"train_limit": 10**30},
    {"loss": "squared-error", "task": "values"},
    {"loss": "binary-cross-entropy", "task": "labels"},
]


@pytest.mark.parametrize("change", VALUES, ids=ascii)
def test_a_sealed_job_that_cannot_be_done_is_one_line(change, cli, here, finished):
    run = copy_of(finished, here / "run")
    write_sealed(run / "job.json", {**read_sealed(run / "job.json"), **change})
    done = cli("evaluate", run, "--trust-model")
    assert done.code == 1
    assert done.refusal.isprintable()


def test_a_job_with_a_name_that_no_json_holds_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(StoreError, match="must be plain JSON"):
        Job(backend="torch", data_dir="images-\udcff").save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_job_and_results_that_are_no_files_are_refused_without_waiting(cli, here, finished):
    for name in ("job.json", "results.json"):
        run = shutil.copytree(finished, here / f"run with {name}")
        (run / name).unlink()
        os.mkfifo(run / name)
        for words in (
            ["evaluate", run],
            ["train", "--model", "mlp", "--epochs", "3", "--cycles", "3", "--output", run],
        ):
            assert str(run) in cli(*words).refusal


def test_a_digest_that_is_kept_with_a_job_is_that_of_its_fields(tmp_path):
    Job(backend="torch", seed=3).save(tmp_path)
    data = (tmp_path / "job.json").read_bytes()
    kept = json.loads(data)
    assert kept["sha256"] == own_digest(data)
    assert kept["seed"] == 3
