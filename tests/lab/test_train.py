"""`snapcore train`: every method, its data and its models, what is written, and in which directory."""

import csv
import gzip
import json
import struct

import numpy as np
import pytest
from sklearn.datasets import load_digits

from snapcore import METHODS, program
from snapcore.store import SnapshotStore

SHORT = ("--model", "mlp", "--epochs", "3", "--cycles", "3")  # 63 updates, members after 21, 42 and 63
TINY = ("--model", "mlp", "--epochs", "2", "--cycles", "2", "--batch-size", "50")
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
NPZ = ("x_train", "y_train", "x_test", "y_test")
MEMBERS = {
    "single": [63],
    "cosine": [63],
    "nocycle": [11, 21, 32, 42, 53, 63],
    "snapshot": [21, 42, 63],
    "singlecycle": [21, 42, 63],
    "independent": [63, 126, 189],
    "star": [21, 42, 63],
}


@pytest.fixture(scope="module")
def arrays():
    """Some of the digits, as bytes: 200 images to train on, 100 to test on."""
    images, labels = load_digits(return_X_y=True)
    x = (images[:300].reshape(-1, 8, 8) * 15).astype(np.uint8)
    y = labels[:300].astype(np.uint8)
    return x[:200], y[:200], x[200:], y[200:]


def write_npz(folder, arrays, name="images.npz"):
    folder.mkdir(exist_ok=True)
    np.savez(folder / name, **dict(zip(NPZ, arrays, strict=True)))
    return folder


def read_history(directory):
    with (directory / "history.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "lr", "loss"]
    return [(int(step), float(lr), float(loss)) for step, lr, loss in rows]


# methods


def test_the_methods_that_are_tested_are_all():
    assert tuple(MEMBERS) == METHODS


@pytest.mark.exhaustive(keep=3)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_its_members_and_scores_them(method, cli, here, results):
    done = cli("train", *SHORT, "--method", method, "--output", "run")
    assert (done.code, done.err) == (0, "")
    found = results(here / "run")
    steps = MEMBERS[method]
    expected = program(method, lr=0.1, steps=63, cycles=3)
    assert {name: found[name] for name in ("backend", "data", "model", "method", "updates")} == {
        "backend": "torch",
        "data": "digits",
        "model": "mlp",
        "method": method,
        "updates": steps[-1],
    }
    assert [member["index"] for member in found["members"]] == list(range(1, len(steps) + 1))
    assert [member["step"] for member in found["members"]] == steps
    assert [member["lr"] for member in found["members"]] == [expected.schedule(step - 1) for step in steps]
    rows = read_history(here / "run")
    assert [row[:2] for row in rows] == [(step + 1, expected.schedule(step)) for step in range(steps[-1])]
    assert (here / "run" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_that_is_printed_is_what_is_written(cli, here, results):
    done = cli("train", *SHORT, "--output", "run")
    found, lines = results(here / "run"), done.out.splitlines()
    assert lines[0].startswith("snapshot on digits: mlp, 1347 training images, 63 updates, 3 members; torch ")
    for member, line in zip(found["members"], lines[1:4], strict=True):
        assert f"member {member['index']}   update {member['step']:>6}" in line
        assert f"error {member['error']:5.2f} %   NLL {member['nll']:.4f}" in line
    for row, line in zip(found["ensemble"], lines[6:9], strict=True):
        shown = [f"{row['m']}", f"{row['error']:.2f}", "%", *(f"{row[name]:.4f}" for name in ("nll", "brier", "ece"))]
        assert line.split() == shown
    assert lines[9].endswith("members, results.json, history.csv and training.png are in run")


def test_the_cnn_with_batch_normalisation_learns_the_digits(cli, here, results):
    assert cli("train", "--epochs", "4", "--cycles", "2", "--output", "run").code == 0
    assert results(here / "run")["ensemble"][-1]["error"] < 20


def test_a_run_that_diverges_says_so_and_keeps_the_members_before(cli, here):
    done = cli("train", *SHORT, "--lr", "1e30", "--output", "run")
    assert done.code == 1
    assert "Lower the learning rate" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert all(np.isfinite(member.lr) for member in SnapshotStore(here / "run").members)


# peers


def test_epochs_that_the_members_do_not_divide_are_no_error(cli, here, results):
    """TorchEnsemble 0.2.0 raises when epochs % M != 0."""
    assert cli("train", "--model", "mlp", "--epochs", "3", "--cycles", "2", "--output", "run").code == 0
    assert [member["step"] for member in results(here / "run")["members"]] == [32, 63]


def test_training_a_second_time_does_not_double_the_ensemble(cli, here, results):
    """A second `fit` of TorchEnsemble 0.2.0 adds its members to those of the first."""
    for _ in range(2):
        assert cli("train", *SHORT).code == 0
    for name in ("digits-mlp-snapshot", "digits-mlp-snapshot-2"):
        assert len(results(here / "runs" / name)["ensemble"]) == 3
    assert cli("train", *SHORT, "--output", "runs/digits-mlp-snapshot").code == 1
    assert len(SnapshotStore(here / "runs" / "digits-mlp-snapshot").members) == 3


def test_the_test_images_pick_no_member(cli, here, arrays, results):
    """TorchEnsemble 0.2.0 keeps the members that do best on its "test" set."""
    x_train, y_train, x_test, y_test = arrays
    shuffled = np.random.default_rng(0).permutation(y_test)
    write_npz(here / "true", arrays)
    write_npz(here / "false", (x_train, y_train, x_test, shuffled))
    for name in ("true", "false"):
        assert cli("train", *TINY, "--data", "x", "--data-dir", name, "--output", f"on_{name}").code == 0
    true, false = (SnapshotStore(here / f"on_{name}") for name in ("true", "false"))
    for index in (1, 2):
        weights = [store.load(index) for store in (true, false)]
        assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert results(here / "on_true")["ensemble"] != results(here / "on_false")["ensemble"]


# seeds


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_members(
    cli, here, finished, other_seed, tensors_of, results
):
    assert cli("train", *SHORT, "--output", "again").code == 0
    assert tensors_of(here / "again") == tensors_of(finished)
    assert results(here / "again") == results(finished)
    assert read_history(here / "again") == read_history(finished)
    for name, content in tensors_of(other_seed).items():
        assert content != tensors_of(finished)[name]


# data


def test_idx_files_and_an_archive_of_the_same_images_train_the_same_members(cli, here, arrays, tensors_of, results):
    folder = here / "idx"
    folder.mkdir()
    for name, array in zip(IDX, arrays, strict=True):
        content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    write_npz(here / "npz", arrays)
    for kind in ("idx", "npz"):
        assert cli("train", *TINY, "--data", "mine", "--data-dir", kind, "--output", f"from_{kind}").code == 0
    assert tensors_of(here / "from_idx") == tensors_of(here / "from_npz")
    assert results(here / "from_idx") == results(here / "from_npz")
    assert results(here / "from_idx")["data"] == "mine"


def test_a_limit_keeps_the_first_training_images_and_all_test_images(cli, here, arrays, tensors_of, results):
    x_train, y_train, x_test, y_test = arrays
    write_npz(here / "all", arrays)
    write_npz(here / "some", (x_train[:150], y_train[:150], x_test, y_test))
    done = cli("train", *TINY, "--data", "x", "--data-dir", "all", "--train-limit", "150", "--output", "limited")
    assert "150 training images, 6 updates" in done.out
    assert cli("train", *TINY, "--data", "x", "--data-dir", "some", "--output", "whole").code == 0
    assert tensors_of(here / "limited") == tensors_of(here / "whole")
    assert results(here / "limited") == results(here / "whole")


# models


def test_a_model_of_ones_own_is_named_by_package_module_and_function(cli, here, finished, tensors_of, results):
    done = cli("train", *SHORT, "--model", "snapcore_torch.models:mlp", "--output", "run")
    assert done.code == 0
    assert tensors_of(here / "run") == tensors_of(finished)
    found, expected = results(here / "run"), results(finished)
    assert found == {**expected, "model": "snapcore_torch.models:mlp"}


def test_the_default_directory_bears_the_name_of_the_function(cli, here, stopping):
    assert cli("train", *SHORT, "--model", "stopping:Net").code == 0
    assert [path.name for path in (here / "runs").iterdir()] == ["digits-Net-snapshot"]


# directories


def test_default_directories_are_numbered(cli, here):
    for seed in range(3):
        done = cli("train", *TINY, "--method", "cosine", "--seed", seed)
        assert done.code == 0
    names = ["digits-mlp-cosine", "digits-mlp-cosine-2", "digits-mlp-cosine-3"]
    assert sorted(path.name for path in (here / "runs").iterdir()) == names
    assert [json.loads((here / "runs" / name / "job.json").read_text())["seed"] for name in names] == [0, 1, 2]
    assert done.out.splitlines()[-1].endswith("are in runs/digits-mlp-cosine-3")


def test_a_directory_with_a_finished_run_is_refused_with_the_cure(cli, finished, tensors_of):
    before, stamp = tensors_of(finished), (finished / "results.json").stat().st_mtime_ns
    done = cli("train", *SHORT, "--output", finished)
    assert (done.code, done.out) == (1, "")
    for cure in ("snapcore evaluate", "--output", "--no-resume"):
        assert cure in done.refusal
    assert tensors_of(finished) == before
    assert (finished / "results.json").stat().st_mtime_ns == stamp


def test_no_resume_moves_a_finished_run_aside(cli, here, tensors_of, results):
    assert cli("train", *TINY, "--output", "run").code == 0
    before = tensors_of(here / "run"), results(here / "run")
    assert cli("train", *TINY, "--seed", "1", "--output", "run", "--no-resume").code == 0
    assert (tensors_of(here / "run.1"), results(here / "run.1")) == before
    assert tensors_of(here / "run") != before[0]
    assert len(results(here / "run")["members"]) == 2


def test_a_job_that_cannot_be_run_does_not_move_the_run_aside(cli, here):
    assert cli("train", *TINY, "--output", "run").code == 0
    for words in (["--lr", "nan"], ["--model", "bogus"], ["--method", "bogus"], ["--batch-size", "5000"]):
        assert cli("train", *TINY, *words, "--output", "run", "--no-resume").code == 1
    assert [path.name for path in here.iterdir()] == ["run"]


def test_another_job_in_a_directory_is_refused_naming_what_differs(cli, finished):
    refusal = cli("train", *SHORT, "--lr", "0.05", "--seed", "7", "--output", finished).refusal
    assert "{'lr': 0.1, 'seed': 0}, asked for {'lr': 0.05, 'seed': 7}" in refusal
    for cure in ("ask for the same", "--output", "--no-resume"):
        assert cure in refusal


def test_a_run_that_the_command_did_not_make_is_refused(cli, here):
    with SnapshotStore("run", "w") as store:
        store.save({"w": np.ones(3)}, index=1, step=9, cycle=0, lr=0.1, framework="torch")
    before = sorted(path.name for path in (here / "run").iterdir())
    refusal = cli("train", *SHORT, "--output", "run").refusal
    assert "run holds no job.json: snapcore train did not make it; choose another" in refusal
    assert sorted(path.name for path in (here / "run").iterdir()) == before
