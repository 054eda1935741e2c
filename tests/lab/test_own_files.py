"""A user's own files, and the directory a shell is in: never replaced, never followed, never moved away."""

import json
import os
import shutil

import pytest

from snapcore.lab.ours import is_ours
from snapcore.lab.sealed import write_sealed
from snapcore.store import SnapshotStore

SHORT = ("--model", "mlp", "--epochs", "1", "--cycles", "1")
NAMES = ("job.json", "history.csv", "training.png", "results.json")
OWN = {
    "job.json": [b'{"steps": 3}', b"", b'{"backend": "torch", "sha256": ""}'],
    "history.csv": [b"epoch,loss\n1,0.5\n", b"", b"step,lr,loss\r\n1,0.1,0.5\r\n"],
    "training.png": [b"\x89PNG\r\n\x1a\n", b"", b"\x89PNG\r\n\x1a\n about snapcore"],
    "results.json": [b'{"accuracy": 0.9}', b"[]", b"not even JSON"],
}


def everything(folder):
    """Every path below, with what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = (
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else path.stat().st_mode
        )
    return found


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in NAMES for content in OWN[name]])
def test_a_file_of_ones_own_in_the_output_is_refused_by_name_before_training(name, content, cli, here):
    (here / "mine").mkdir()
    (here / "mine" / name).write_bytes(content)
    before = everything(here)
    for more in ([], ["--no-resume"]):
        done = cli("train", *SHORT, "--output", "mine", *more)
        assert (done.code, done.out) == (1, "")
        assert f"mine/{name} is not snapcore's" in done.refusal
    assert everything(here) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["a link to a file", "a link to nothing", "a directory", "a FIFO"])
def test_what_is_no_file_under_such_a_name_is_refused_and_not_followed(name, kind, cli, here):
    (here / "mine").mkdir()
    (here / "elsewhere").write_text("precious")
    path = here / "mine" / name
    if kind == "a directory":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(here / ("elsewhere" if kind == "a link to a file" else "gone"))
    before = {key: value for key, value in everything(here).items() if kind != "a FIFO"}
    assert f"mine/{name} is not snapcore's" in cli("train", *SHORT, "--output", "mine").refusal
    if kind != "a FIFO":
        assert everything(here) == before


@pytest.mark.parametrize("name", ["results.json", "history.csv", "training.png"])
def test_a_file_that_took_the_place_of_a_runs_own_is_not_replaced_on_resuming(name, cli, here, stopping):
    words = ("train", "--model", "stopping:Net", "--epochs", "2", "--cycles", "2", "--output", "run")
    stopping(30)
    assert cli(*words).code == 130
    stopping(None)
    (here / "run" / name).unlink(missing_ok=True)
    (here / "run" / name).write_bytes(OWN[name][0])
    before = everything(here / "run")
    assert f"run/{name} " in cli(*words).refusal
    assert everything(here / "run") == before
    (here / "run" / name).unlink()
    assert cli(*words).code == 0


def test_results_linked_elsewhere_are_refused_by_evaluate_before_it_scores(cli, here, finished):
    run = shutil.copytree(finished, here / "run")
    (run / "results.json").unlink()
    (run / "results.json").symlink_to(here / "elsewhere")
    done = cli("evaluate", run)
    assert (done.code, done.out) == (1, "")
    assert "run/results.json is not snapcore's" in done.refusal
    assert not (here / "elsewhere").exists()


@pytest.mark.parametrize("content", OWN["results.json"])
def test_results_of_ones_own_are_not_replaced_by_evaluate(content, cli, here, finished):
    (here / "results.json").write_bytes(content)
    done = cli("evaluate", finished, "--output", ".")
    assert done.out == ""
    assert "results.json is not snapcore's" in done.refusal
    assert (here / "results.json").read_bytes() == content


def test_what_snapcore_wrote_itself_is_replaced(cli, here, finished):
    for last in (1, 2):
        assert cli("evaluate", finished, "--last", last, "--output", "scores").code == 0
    assert len(json.loads((here / "scores" / "results.json").read_text())["members"]) == 2


def test_other_files_in_the_output_stay(cli, here):
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("precious")
    assert cli("train", *SHORT, "--output", "mine").code == 0
    assert (here / "mine" / "notes.txt").read_text() == "precious"


# pictures


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf", "a.eps"])
def test_a_picture_is_replaced_if_snapcore_drew_it_and_else_refused(name, cli, here):
    for steps in ("60", "90"):
        assert cli("schedule", "--steps", steps, "--cycles", "3", "--plot", name).code == 0
    assert is_ours(here / name)
    (here / name).write_bytes(b"a holiday")
    assert f"{name} cannot be written: what is there is not snapcore's" in cli("schedule", "--plot", name).refusal
    assert (here / name).read_bytes() == b"a holiday"


def test_a_picture_is_not_drawn_through_a_link(cli, here):
    (here / "elsewhere.png").write_bytes(b"a holiday")
    (here / "a.png").symlink_to(here / "elsewhere.png")
    assert "not snapcore's" in cli("schedule", "--plot", "a.png").refusal
    assert (here / "elsewhere.png").read_bytes() == b"a holiday"


# the shell's directory


@pytest.mark.parametrize("output", [".", "{run}", "..", "{link}"])
def test_no_resume_does_not_rename_the_directory_a_shell_is_in(output, cli, here, monkeypatch):
    with SnapshotStore("run", "w"):
        pass
    (here / "link").symlink_to(here / "run")
    inside = here / "run" / "below" if output == ".." else here / "run"
    inside.mkdir(exist_ok=True)
    monkeypatch.chdir(inside)
    before = sorted(here.iterdir())
    words = ("train", *SHORT, "--output", output.format(run=here / "run", link=here / "link"), "--no-resume")
    assert "--no-resume would rename" in cli(*words).refusal
    assert sorted(here.iterdir()) == before


def test_a_run_beside_the_shells_directory_is_moved_aside_as_ever(cli, here, monkeypatch):
    with SnapshotStore("run", "w"):
        pass
    (here / "runs").mkdir()
    monkeypatch.chdir(here / "runs")
    assert cli("train", *SHORT, "--output", "../run", "--no-resume").code == 0
    assert (here / "run.1" / "snapcore.json").exists()


# what is recognised


def test_a_table_is_ours_only_beside_a_job_of_ours(tmp_path):
    (tmp_path / "history.csv").write_bytes(b"step,lr,loss\r\n")
    assert not is_ours(tmp_path / "history.csv")
    write_sealed(tmp_path / "job.json", {"backend": "torch"})
    assert is_ours(tmp_path / "history.csv")


def test_every_file_of_a_finished_run_is_recognised(finished):
    assert [name for name in NAMES if is_ours(finished / name)] == list(NAMES)
