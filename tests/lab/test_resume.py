"""A run of the command that is ended anywhere is resumed by the same command, and no file shows it afterwards."""

import csv
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from snapcore import CosineCycles
from snapcore.lab.cli import run
from snapcore.run import execute
from snapcore.store import SnapshotStore

pytestmark = pytest.mark.xdist_group("lab resume")  # what its tests share is made once
TRAIN = ("train", "--model", "stopping:Net", "--epochs", "6", "--cycles", "3")  # 126 updates, members every 42
HEADER = ["step", "lr", "loss"]


@pytest.fixture(scope="module")
def never_stopped(models, tmp_path_factory):
    """The directory of a finished run; read it, and leave it as it is."""
    directory = tmp_path_factory.mktemp("lab") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(models)
        assert run([*TRAIN, "--output", str(directory)]) == 0
    return directory


@pytest.fixture
def assert_same_run(tensors_of, results):
    def check(run, whole):
        assert tensors_of(run) == tensors_of(whole)
        assert results(run) == results(whole)
        for name in ("snapcore.json", "job.json", "history.csv"):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name
        assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
        with (run / "history.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        schedule = CosineCycles(0.1, 126, 3)
        assert header == HEADER
        assert [(int(row[0]), float(row[1])) for row in rows] == [(n + 1, schedule(n)) for n in range(126)]

    return check


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize(
    ("how", "update", "options", "kept"),
    [
        ("SIGTERM", 60, (), 84),  # received in the middle of a slice, answered at its end
        ("SIGTERM", 55, ("--resume-every", "10"), 60),
        ("SIGKILL", 100, (), None),
        ("SIGKILL", 30, ("--resume-every", "7"), None),
    ],
)
def test_a_killed_run_is_resumed_by_the_same_command_and_ends_as_if_never_stopped(
    how, update, options, kept, python, cli, here, stopping, never_stopped, assert_same_run
):
    command = (*TRAIN, *options, "--output", "killed")
    killed = python("-m", "snapcore", *command, STOP_AT=str(update), STOP_HOW=how)
    if kept is None:
        assert killed.code == -9
        assert killed.err == ""
    else:
        assert killed.code == 143
        assert killed.refusal == f"snapcore: killed: left after {kept} of 126 updates; it resumes after update {kept}"
    assert not (here / "killed" / "results.json").exists()
    assert cli(*command).code == 0
    assert_same_run(here / "killed", never_stopped)


@pytest.mark.parametrize("every", [None, 1, 10])
@pytest.mark.parametrize("update", [1, 43, 126])
def test_a_run_left_in_any_update_resumes_from_its_last_point(
    update, every, cli, here, stopping, never_stopped, assert_same_run, caplog
):
    caplog.set_level(logging.INFO, "snapcore")
    options = () if every is None else ("--resume-every", every)
    stopping(update)
    left = cli(*TRAIN, *options, "--output", "left")
    assert left.code == 130
    done = update - 1
    point = max(done // 42 * 42, 0 if every is None else done // every * every)
    ending = f"it resumes after update {point}" if point else "there is no resume point"
    assert caplog.messages[-1].endswith(ending)
    caplog.clear()
    stopping(None)
    assert cli(*TRAIN, *options, "--output", "left").code == 0
    assert caplog.messages == ([f"left: resumed after update {point} of 126"] if point else [])
    assert_same_run(here / "left", never_stopped)


def test_a_run_that_is_left_again_and_again_still_ends_the_same(cli, here, stopping, never_stopped, assert_same_run):
    stopping(25)  # counted from where each attempt begins
    codes = [cli(*TRAIN, "--resume-every", "10", "--output", "left").code for _ in range(6)]
    stopping(None)
    codes.append(cli(*TRAIN, "--resume-every", "10", "--output", "left").code)
    assert codes == [130] * 6 + [0]
    assert_same_run(here / "left", never_stopped)


def test_without_an_output_the_same_command_finds_the_run_it_left(cli, here, stopping):
    stopping(50)
    assert cli(*TRAIN).code == 130
    stopping(None)
    other = cli(*TRAIN, "--seed", "1")
    assert other.out.splitlines()[-1].endswith("runs/digits-Net-snapshot-2")
    same = cli(*TRAIN)
    assert same.code == 0
    assert same.out.splitlines()[-1].endswith("runs/digits-Net-snapshot")
    assert "member 1 " not in same.out
    assert "member 2 " in same.out
    assert cli(*TRAIN).out.splitlines()[-1].endswith("runs/digits-Net-snapshot-3")


def test_no_resume_without_an_output_begins_a_new_run(cli, here, stopping):
    stopping(50)
    assert cli(*TRAIN).code == 130
    stopping(None)
    done = cli(*TRAIN, "--no-resume")
    assert done.out.splitlines()[-1].endswith("runs/digits-Net-snapshot-2")
    assert len(SnapshotStore("runs/digits-Net-snapshot").members) == 1


def test_no_resume_moves_an_unfinished_run_aside(cli, here, stopping, never_stopped, assert_same_run):
    stopping(50)
    assert cli(*TRAIN, "--output", "run").code == 130
    stopping(None)
    assert cli(*TRAIN, "--output", "run", "--no-resume").code == 0
    assert len(SnapshotStore("run.1").members) == 1
    assert SnapshotStore("run.1").stopped is None
    assert_same_run(here / "run", never_stopped)


def test_an_unfinished_run_of_another_job_is_refused_and_left_as_it_is(cli, here, stopping):
    stopping(50)
    assert cli(*TRAIN, "--output", "run").code == 130
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    refusal = cli(*TRAIN, "--batch-size", "32", "--output", "run").refusal
    assert "{'batch_size': 64}, asked for {'batch_size': 32}" in refusal
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before


def test_scoring_an_unfinished_run_does_not_keep_it_from_being_resumed(
    cli, here, stopping, never_stopped, assert_same_run, results
):
    stopping(100)
    assert cli(*TRAIN).code == 130
    stopping(None)
    run = here / "runs" / "digits-Net-snapshot"
    assert cli("evaluate", run, "--trust-model").code == 0
    early = results(run)
    assert (early["updates"], len(early["members"])) == (84, 2)
    assert early["members"] == results(never_stopped)["members"][:2]
    assert cli(*TRAIN).code == 0
    assert [path.name for path in (here / "runs").iterdir()] == [run.name]
    assert_same_run(run, never_stopped)


def test_a_run_without_a_member_cannot_be_scored_yet(cli, here, stopping):
    stopping(10)
    assert cli(*TRAIN, "--output", "run").code == 130
    assert (
        "run holds no finished member: train until the first cycle ends"
        in cli("evaluate", "run", "--trust-model").refusal
    )


@pytest.mark.parametrize("lost", [["results.json"], ["results.json", "training.png", "history.csv"]])
def test_a_finished_run_without_results_is_scored_and_not_trained_again(
    lost, cli, here, stopping, never_stopped, results
):
    run = Path(shutil.copytree(never_stopped, here / "run"))
    stamps = {path: path.stat().st_mtime_ns for path in run.glob("snapshot-*")}
    for name in lost:
        (run / name).unlink()
    done = cli(*TRAIN, "--output", "run")
    assert done.code == 0
    assert "member " not in done.out
    assert results(run) == results(never_stopped)
    assert {path: path.stat().st_mtime_ns for path in run.glob("snapshot-*")} == stamps


def test_results_that_could_not_be_written_whole_are_not_there_at_all(cli, here, stopping, never_stopped, monkeypatch):
    def no_room(self, content):
        raise OSError(28, "No space left on device")

    shutil.copytree(never_stopped, here / "run")
    before = (here / "run" / "results.json").read_bytes()
    monkeypatch.setattr("pathlib.Path.write_bytes", no_room)
    assert "No space left on device" in cli("evaluate", "run", "--trust-model").refusal
    assert (here / "run" / "results.json").read_bytes() == before


def test_the_history_is_whole_when_the_last_member_is_there(cli, here, stopping, monkeypatch):
    """Killed between the last member and the results, nothing is trained again that could fill the table."""

    def killed_at_the_end(*arguments, **options):
        execute(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("snapcore.lab.train.execute", killed_at_the_end)
        assert cli(*TRAIN, "--output", "run").code == 130
    assert SnapshotStore("run").stopped == "finished"
    assert (here / "run" / "history.csv").read_text().count("\n") == 1 + 126


# Ctrl-C


@pytest.mark.parametrize("options", [(), ("--resume-every", "10")])
def test_ctrl_c_ends_with_one_line_that_says_from_where_the_run_resumes(
    options, python, cli, here, stopping, never_stopped, assert_same_run
):
    command = (*TRAIN, *options, "--output", "left")
    left = python("-m", "snapcore", *command, STOP_AT="60", STOP_HOW="SIGINT")
    assert left.code == 130
    point = int(re.search(r"resumes after update (\d+)$", left.refusal)[1])
    assert point >= 42
    rows = (here / "left" / "history.csv").read_text().splitlines()
    assert len(rows) >= 1 + point
    assert cli(*command).code == 0
    assert_same_run(here / "left", never_stopped)


def test_ctrl_c_leaves_the_losses_so_far_and_a_second_one_spoils_nothing(cli, here, stopping):
    stopping(60)
    assert cli(*TRAIN, "--output", "left").code == 130
    steps = [int(line.split(",")[0]) for line in (here / "left" / "history.csv").read_text().splitlines()[1:]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 42


# what a run is resumed with


CHANGES = [
    ("--lr", "0.05", "lr"),
    ("--lr-min", "0.01", "lr_min"),
    ("--warmup-steps", "3", "warmup_steps"),
    ("--remainder", "even", "remainder"),
    ("--momentum", "0.5", "momentum"),
    ("--weight-decay", "0.5", "weight_decay"),
    ("--optimizer", "adamw", "optimizer"),
    ("--clip-norm", "1", "clip_norm"),
    ("--precision", "bfloat16", "precision"),
    ("--batch-size", "32", "batch_size"),
    ("--seed", "3", "seed"),
    ("--train-limit", "1000", "train_limit"),
    ("--method", "star", "method"),
]


@pytest.fixture(scope="module")
def unfinished(models, tmp_path_factory):
    """The directory of a run that was left; copy it."""
    directory = tmp_path_factory.mktemp("lab") / "unfinished"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(models)
        patch.setenv("STOP_AT", "50")
        patch.setenv("STOP_HOW", "ctrl-c")
        assert run([*TRAIN, "--output", str(directory)]) == 130
    return directory


@pytest.mark.parametrize(("option", "value", "name"), CHANGES)
def test_a_run_is_not_resumed_with_another_setting_and_nothing_is_touched(
    option, value, name, cli, here, stopping, unfinished
):
    left = Path(shutil.copytree(unfinished, here / "left"))
    before = {path: path.read_bytes() for path in left.rglob("*") if path.is_file()}
    done = cli(*TRAIN, option, value, "--output", "left")
    assert (done.code, done.out) == (1, "")
    assert f"left holds a run with {{'{name}': " in done.refusal
    assert {path: path.read_bytes() for path in left.rglob("*") if path.is_file()} == before


@pytest.fixture
def own_data(here):
    """Write data of one's own to a folder, the test images being some of many."""
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 8, 8)), np.arange(64) % 10

    def write(folder, start=0):
        (here / folder).mkdir(exist_ok=True)
        np.savez(here / folder / "a.npz", x_train=x, y_train=y, x_test=x[start : start + 20], y_test=y[:20])

    return write


OWN = ("train", "--model", "stopping:Net", "--epochs", "60", "--cycles", "2", "--data", "own", "--output", "run")


def test_a_run_whose_images_have_changed_is_not_resumed(cli, here, stopping, own_data):
    own_data("data")
    stopping(40)
    assert cli(*OWN, "--data-dir", "data").code == 130
    stopping(None)
    own_data("data", start=1)
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    refusal = cli(*OWN, "--data-dir", "data").refusal
    assert "run holds a run on other images than own has now: restore them" in refusal
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before


def test_a_run_whose_images_were_moved_is_resumed_and_says_what_differs(cli, here, stopping, own_data, caplog):
    caplog.set_level(logging.INFO, "snapcore")
    own_data("data")
    assert cli(*(word if word != "run" else "whole" for word in OWN), "--data-dir", "data").code == 0
    stopping(40)
    assert cli(*OWN, "--data-dir", "data").code == 130
    stopping(None)
    (here / "data").rename(here / "moved")
    caplog.clear()
    assert cli(*OWN, "--data-dir", "moved", "--device", "cpu").code == 0
    first, second = caplog.messages
    assert first == f"run is resumed with another --data-dir {here}/moved (was {here}/data), --device cpu (was None)"
    assert second == "run: resumed after update 30 of 60"
    for name in ("snapshot-001.safetensors", "snapshot-002.safetensors", "history.csv"):
        assert (here / "run" / name).read_bytes() == (here / "whole" / name).read_bytes()
    assert cli("evaluate", "run", "--trust-model").code == 0


# damage


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"epoch,loss\r\n1,0.5\r\n",
        b"step,lr,loss\r\n1,0.1,0.5,9\r\n",
        b"step,lr,loss\r\n1,0.2,0.5\r\n",
        b"step,lr,loss\r\n2,0.1,nan\r\n",
        b"step,lr,loss\r\n1,0.1,0.5\r\n3,0.1,0.5\r\n",
        b"step,lr,loss\r\n0,0.1,0.5\r\n",
        b"step,lr,loss\r\n-1,0.1,0.5\r\n",
        b'step,lr,loss\r\n"' + b"1" * 200000 + b'",0.1,0.5\r\n',
        b"step,lr,loss\r\n" + b"1" * 5000 + b",0.1,0.5\r\n",
    ],
    ids=lambda content: ascii(content[:40]),
)
def test_a_table_of_losses_that_is_not_this_runs_is_one_line_and_nothing_is_touched(
    content, cli, here, stopping, unfinished
):
    left = Path(shutil.copytree(unfinished, here / "left"))
    (left / "history.csv").write_bytes(content)
    before = {path: path.read_bytes() for path in left.rglob("*") if path.is_file()}
    done = cli(*TRAIN, "--output", "left")
    assert (done.code, done.out) == (1, "")
    assert "left/history.csv " in done.refusal
    assert {path: path.read_bytes() for path in left.rglob("*") if path.is_file()} == before
    (left / "history.csv").unlink()
    assert cli(*TRAIN, "--output", "left").code == 0
