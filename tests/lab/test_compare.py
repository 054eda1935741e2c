"""`snapcore compare`: cells that are trained once, wherever, and what is said of them."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from snapcore import DataError, StoreError
from snapcore.ensemble import Predictions
from snapcore.lab import compare as module
from snapcore.lab.cells import Cell, Plan, train_cell
from snapcore.lab.cli import run as command
from snapcore.lab.compare import compare
from snapcore.lab.comparison import summary
from snapcore.lab.comparison_table import describe
from snapcore.lab.executors import Processes, connect
from snapcore.lab.job import Job
from snapcore.lab.sealed import read_sealed
from snapcore.verdict import compare_paired

from .conftest import PATHS, SHORT, STOPPING

JOB = Job(
    backend="torch", model="mlp", epochs=3, cycles=3, held_out=0.1, loss=None, task=None
)  # as the command makes it
PLAN = Plan(JOB, ("cosine", "snapshot"), (0, 1))
WORDS = ("compare", *SHORT, "--seeds", "2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The directory of a comparison of two methods with two seeds; copy it."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("lab") / "whole"
    assert command([*WORDS, "--output", str(directory)]) == 0
    return directory


@pytest.fixture
def copied(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "copy", symlinks=True)


def scores(directory):
    """What a comparison says, without the digest."""
    found = json.loads((directory / "comparison.json").read_text())
    found.pop("sha256")
    return found


def test_every_method_is_trained_with_every_seed_at_one_budget(undisturbed):
    names = {path.name for path in (undisturbed / "cells").iterdir()}
    cells = [f"{method}-seed{seed}" for method in ("cosine", "snapshot") for seed in (0, 1)]
    assert names == {*cells, *(f"{cell}.json" for cell in cells)}
    found = scores(undisturbed)
    assert found["seeds"] == [0, 1]
    for method, members in (("cosine", 1), ("snapshot", 3)):
        results = [
            json.loads((undisturbed / "cells" / f"{method}-seed{k}" / "results.json").read_text()) for k in (0, 1)
        ]
        rows = found["methods"][method]
        assert rows["updates"] == [54, 54]
        assert rows["members"] == [members] * 2
        assert rows["error"] == [each["ensemble"][-1]["error"] for each in results]
        assert rows["nll"] == [each["ensemble"][-1]["nll"] for each in results]


def test_pairs_are_those_of_the_verdict_by_seed(undisturbed):
    found = scores(undisturbed)
    for pair in found["pairs"]:
        mine, other = (found["methods"][pair[side]][pair["score"]] for side in ("a", "b"))
        expected = compare_paired(mine, other)
        assert (pair["difference"], pair["low"], pair["p"]) == (expected.difference, expected.low, expected.p)
    assert [pair["verdict"] for pair in found["pairs"]] == [None] * len(found["pairs"])
    assert found["verdict"].startswith("Not decided: snapshot has ")


@pytest.mark.parametrize(("share", "said"), [("0.1", True), ("0.4", False)])
def test_a_part_held_out_that_is_too_small_to_calibrate_on_is_told_of_at_the_start(
    cli, caplog, monkeypatch, share, said
):
    monkeypatch.setattr(module, "train_cell", lambda *arguments: {"updates": 60, "ensemble": [{"m": 1, "nll": 0.2}]})
    assert cli(*WORDS, "--held-out", share, "--output", "all").code == 0
    assert any("137 examples are held out: under 500" in each.getMessage() for each in caplog.records) is said


def test_a_second_time_nothing_is_trained(copied, cli, monkeypatch):
    monkeypatch.setattr(module, "train_cell", None)
    again = cli(*WORDS, "--output", copied)
    assert again.code == 0
    assert "cosine − snapshot" in again.out


def test_methods_and_seeds_that_are_added_train_only_themselves(copied, cli, monkeypatch):
    trained = []

    def train(job, directory, resume_every):
        trained.append(Path(directory).name)
        return train_cell(job, directory, resume_every)

    monkeypatch.setattr(module, "train_cell", train)
    assert cli(*WORDS, "--methods", "cosine,snapshot,independent", "--output", copied).code == 0
    assert trained == ["independent-seed0", "independent-seed1"]
    found = scores(copied)
    assert found["methods"]["independent"]["updates"] == [162, 162]
    assert set(found["equivalent"]) == {"cosine", "snapshot"}


def test_the_command_shows_a_table_and_ends_in_the_verdict(copied, cli):
    shown = cli(*WORDS, "--output", copied).out.splitlines()
    assert any("NLL at T" in line and "updates" in line for line in shown)
    assert shown[-2].startswith("Not decided: snapshot has ")


def test_what_evaluate_writes_into_a_cell_is_not_what_is_compared(copied, cli):
    before = scores(copied)
    assert cli("evaluate", copied / "cells" / "snapshot-seed0", "--last", "1").code == 0
    assert cli(*WORDS, "--output", copied).code == 0
    assert scores(copied) == before


def test_a_cell_that_was_trained_and_not_recorded_is_scored_and_not_trained_again(copied, cli):
    before, cell = scores(copied), copied / "cells" / "snapshot-seed0"
    member = (cell / "snapshot-001.safetensors").stat().st_mtime_ns
    cell.with_name("snapshot-seed0.json").unlink()
    assert cli(*WORDS, "--output", copied).code == 0
    assert scores(copied) == before
    assert (cell / "snapshot-001.safetensors").stat().st_mtime_ns == member


def test_data_that_have_changed_are_refused_before_anything_is_trained(cli, here):
    def keep(shift):
        x = np.random.default_rng(0).normal(size=(96, 3)).astype(np.float32) + shift
        np.savez(here / "rows.npz", x_train=x, y_train=x.sum(axis=1), x_test=x[:20], y_test=x[:20].sum(axis=1))

    keep(0.0)
    words = ("compare", *SHORT, "--data", "rows", "--data-dir", "rows.npz", "--lr", "0.01", "--output", "all")
    assert cli(*words, "--seeds", "1").code == 0
    keep(1.0)
    assert "holds a comparison on other data than rows has now: restore them" in cli(*words, "--seeds", "2").refusal
    assert not (here / "all" / "cells" / "cosine-seed1").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--backend", "torsh"), "torsh"),
        (("--data", "nosuch"), "data must be one of digits"),
        (("--cycles", "100000"), "cycles must be in 1.."),
        (("--held-out", "1"), "held_out must be a share"),
    ],
)
def test_what_is_known_at_the_start_is_said_once_and_leaves_nothing_behind(cli, here, words, said):
    refused = cli("compare", "--model", "mlp", "--seeds", "3", *words, "--output", "new")
    assert refused.code == 1
    assert refused.refusal.count(said) == 1
    assert not (here / "new").exists()


# Elsewhere, and killed


DYING = STOPPING.replace(
    "def forward(self, x):",
    """def forward(self, x):
        if self.training and self.updates == 29 and "MARK" in os.environ and not os.path.exists(os.environ["MARK"]):
            open(os.environ["MARK"], "x").close()
            os.kill(os.getpid(), signal.SIGKILL)""",
)


def test_in_processes_of_which_one_is_killed_the_table_is_the_undisturbed_one(tmp_path, monkeypatch):
    """In update 30 of 63, after the first of three members."""
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *PATHS]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(tmp_path)
    plan = Plan(Job(backend="torch", model="dying:Net", epochs=3, cycles=3), ("snapshot", "cosine"), (0,))
    compare(plan, tmp_path / "whole")
    monkeypatch.setenv("MARK", str(tmp_path / "killed once"))
    with Processes(2) as executor:
        compare(plan, tmp_path / "killed", executor=executor)
    assert (tmp_path / "killed once").exists()
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")


@pytest.mark.exhaustive
def test_by_dask_with_a_worker_that_is_killed_the_table_is_the_undisturbed_one(undisturbed, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    killed = []

    def kill(done, left):
        """After the first cell: whatever worker there is loses what it was doing."""
        if done and not killed:
            killed.append(next(iter(cluster.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

    with cluster, connect(cluster.scheduler_address.replace("tcp://", "dask://")) as executor:
        compare(PLAN, tmp_path / "dask", executor=executor, resume_every=5, watch=kill)
    assert killed
    assert scores(tmp_path / "dask") == scores(undisturbed)


@pytest.mark.exhaustive
def test_by_submitit_the_table_is_the_undisturbed_one(undisturbed, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executor = submitit.LocalExecutor(tmp_path / "logs")
    executor.update_parameters(timeout_min=5)
    compare(PLAN, tmp_path / "submitit", executor=executor)
    assert scores(tmp_path / "submitit") == scores(undisturbed)


class Dying:
    """An executor whose workers die."""

    def __init__(self):
        self.calls = 0

    def submit(self, call, *arguments):
        self.calls += 1
        return self

    def done(self):
        return True

    def exception(self):
        return RuntimeError("worker lost")


def test_a_cell_whose_workers_all_die_is_said_and_the_others_are_compared(copied):
    shutil.rmtree(copied / "cells" / "snapshot-seed1")
    (copied / "cells" / "snapshot-seed1.json").unlink()
    executor = Dying()
    found = compare(PLAN, copied, executor=executor)
    assert executor.calls == 3
    assert found["failed"] == {"snapshot-seed1": "tried 3 times, at last RuntimeError: worker lost"}
    assert found["methods"]["snapshot"]["error"][1] is None
    assert {pair["pairs"] for pair in found["pairs"]} == {0}
    assert "snapshot-seed1 failed: tried 3 times" in " ".join(describe(found))


def test_a_worker_that_does_not_see_the_directory_says_so(tmp_path):
    with pytest.raises(StoreError, match=r"is not seen by the worker on .*: give an --output that all machines share"):
        train_cell({"backend": "torch"}, str(tmp_path / "cells" / "snapshot-seed0"))


def test_a_cell_that_fails_ends_the_command_with_an_error(cli, monkeypatch):
    def fail(job, directory, resume_every):
        raise DataError("the loss is not finite")

    monkeypatch.setattr(module, "train_cell", fail)
    refused = cli(*WORDS, "--output", "all")
    assert refused.code == 1
    assert "no cell is trained: the loss is not finite" in refused.err


# What cannot be compared


def results(updates=60, **last):
    return {"updates": updates, "ensemble": [{"m": 1, "error": 5.0, "nll": 0.2, "brier": 0.1, "ece": 0.01, **last}]}


def test_methods_come_in_the_order_in_which_they_were_asked_for_whatever_has_failed():
    cells = {Cell("snapshot", seed): results(nll=0.2 + seed / 100) for seed in (0, 1)}
    cells |= {Cell("mine", seed): results() for seed in (0, 1)} | {Cell("star", 1): results()}
    found = summary(cells, {Cell("star", 0): "full"}, methods=("star", "snapshot"))
    assert list(found["methods"]) == ["star", "snapshot", "mine"]
    assert found["failed"] == {"star-seed0": "full"}


def test_the_equivalent_is_of_the_seeds_that_both_have():
    curve = [{"m": m, "error": 5.0, "nll": nll} for m, nll in ((1, 0.4), (2, 0.3))]
    cells = {Cell("independent", 0): {"updates": 120, "ensemble": curve}}
    cells |= {Cell("independent", 2): {"updates": 60, "ensemble": curve[:1]}}
    cells |= {Cell("snapshot", 0): results(nll=0.35), Cell("snapshot", 1): results(nll=9.0)}
    assert summary(cells, {})["equivalent"] == {"snapshot": {"nll": pytest.approx(1.5)}}


def test_methods_of_unequal_budgets_are_named():
    cells = {Cell("cosine", 0): results(60), Cell("snapshot", 0): results(66)}
    with pytest.raises(DataError, match="got updates of cosine-seed0: 60; snapshot-seed0: 66: leave those that differ"):
        summary(cells, {})


def test_a_score_that_is_not_finite_is_left_out_with_its_seed():
    cells = {Cell(method, seed): results() for method in ("cosine", "snapshot") for seed in range(7)}
    cells[Cell("snapshot", 3)] = results(nll=math.nan)
    found = summary(cells, {})
    assert found["methods"]["snapshot"]["nll"][3] is None
    assert next(pair for pair in found["pairs"] if pair["score"] == "nll")["pairs"] == 6


def test_where_no_temperature_was_worth_fitting_it_is_one():
    cells = {Cell("cosine", 0): results(), Cell("snapshot", 0): results(calibrated_nll=0.15)}
    rows = summary(cells, {})["methods"]
    assert (rows["cosine"]["calibrated_nll"], rows["snapshot"]["calibrated_nll"]) == ([0.2], [0.15])


def test_the_equivalent_is_read_off_the_means_of_independent_networks():
    curve = [{"m": m, "error": 5.0, "nll": nll} for m, nll in ((1, 0.4), (2, 0.3), (3, 0.25))]
    cells = {Cell("independent", seed): {"updates": 180, "ensemble": curve} for seed in (0, 1)}
    cells |= {Cell("snapshot", 0): results(nll=0.34), Cell("snapshot", 1): results(nll=0.36)}
    assert summary(cells, {})["equivalent"] == {"snapshot": {"nll": pytest.approx(1.5)}}


@pytest.mark.parametrize(
    ("nlls", "said"),
    [((0.30, 0.35), "Worth it here: snapshot has 0.0502"), ((0.35, 0.30), "Not worth it here: snapshot has 0.0498")],
)
def test_six_seeds_of_one_sign_decide(nlls, said):
    cells = {
        Cell(method, seed): results(nll=nll + seed / 1000)
        for method, nll in zip(("snapshot", "cosine"), nlls, strict=True)
        for seed in range(6)
    }
    cells[Cell("cosine", 5)] = results(nll=nlls[1] + 0.006)
    assert summary(cells, {})["verdict"].startswith(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--methods", "cosine,snap"), "methods must be of single, cosine"),
        (("--methods", "cosine,cosine"), "methods must be one or more, each once, got cosine, cosine"),
        (("--jobs", "2", "--executor", "dask://here:1"), "Invalid value for --jobs"),
        (("--executor", "slurm://here"), "executor must be dask://host:port, got 'slurm://here'"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(cli, here, words, said):
    refused = cli("compare", *words, "--output", "new")
    assert refused.code != 0
    assert said in refused.refusal
    assert not (here / "new" / "cells").exists()


def test_a_directory_of_another_plan_is_refused_and_left_alone(copied, cli):
    before = (copied / "comparison.json").read_bytes()
    refused = cli(*WORDS, "--lr", "0.2", "--output", copied)
    assert refused.code == 1
    assert "'lr': 0.1" in refused.refusal
    shutil.rmtree(copied / "cells")
    refused = cli(*WORDS, "--lr", "0.2", "--output", copied)
    assert "holds a comparison with {'lr': 0.1}, asked for {'lr': 0.2}" in refused.refusal
    assert (copied / "comparison.json").read_bytes() == before


def test_a_users_own_comparison_json_is_not_replaced(cli, here):
    (here / "mine").mkdir()
    (here / "mine" / "comparison.json").write_text("{}")
    refused = cli(*WORDS, "--output", "mine")
    assert "mine/comparison.json is not snapcore's, and is not replaced" in refused.refusal
    assert [path.name for path in (here / "mine").iterdir()] == ["comparison.json"]


def test_interrupted_while_it_writes_the_file_before_stays(copied, monkeypatch):
    before = read_sealed(copied / "comparison.json")

    def full(path, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_sealed", full)
    with pytest.raises(StoreError, match="cannot be written"):
        compare(PLAN, copied)
    assert read_sealed(copied / "comparison.json") == before


# Runs of others


@pytest.fixture
def mine(undisturbed, tmp_path):
    """Two runs without a job, as a loop of one's own leaves them, with predictions; copies of the snapshot cells."""
    runs = []
    for seed in (0, 1):
        run = shutil.copytree(undisturbed / "cells" / f"snapshot-seed{seed}", tmp_path / f"mine-seed{seed}")
        for name in ("job.json", "results.json", "history.csv", "training.png"):
            (run / name).unlink()
        runs.append(run)
    return runs


def added(runs):
    return [word for run in runs for word in ("--add", run)]


def test_runs_of_a_loop_of_ones_own_are_compared_by_their_predictions(copied, cli, mine):
    assert cli(*WORDS, "--output", copied, *added(mine)).code == 0
    rows = scores(copied)["methods"]
    assert rows["mine"] == rows["snapshot"]


def test_of_two_runs_of_one_name_neither_is_taken(copied, cli, mine):
    other = shutil.copytree(mine[0], copied.parent / "other" / "mine-seed0")
    refused = cli(*WORDS, "--output", copied, *added([mine[0], other]))
    assert "mine-seed0 would be there twice" in refused.refusal


def test_what_cannot_be_calibrated_is_not_compared_with_what_is(copied, cli, mine):
    (mine[0] / "predictions" / "held-out.safetensors").unlink()
    assert "held-out.safetensors does not exist" in cli(*WORDS, "--output", copied, *added(mine)).refusal


def test_what_is_added_at_another_budget_is_named(copied, cli, mine):
    refused = cli(*WORDS, "--epochs", "4", "--output", copied.parent / "longer", *added(mine))
    assert "got 54 updates in" in refused.refusal
    assert not (copied.parent / "longer").exists()


def rewritten(run, change):
    path = run / "predictions" / "test.safetensors"
    kept = Predictions.open(path)
    changed = Predictions(*change(np.array(kept[:]), np.array(kept.labels)))
    path.unlink()
    changed.save(path)


def fewer(run):
    rewritten(run, lambda logs, labels: (logs[:2], labels))


def shuffled(run):
    rewritten(run, lambda logs, labels: (logs[:, ::-1], labels[::-1]))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: run.rename(run.with_name("mine")), "must be called NAME-seedK"),
        (lambda run: shutil.rmtree(run / "predictions"), "test.safetensors does not exist: save the members'"),
        (lambda run: run.rename(run.with_name("snapshot-seed0")), "snapshot-seed0 would be there twice"),
        (fewer, "must hold labels and all 3 members of the run, in order, got 2"),
        (shuffled, "was tested on other examples than digits's test set, or in another order"),
    ],
    ids=["name", "predictions", "double", "members", "examples"],
)
def test_what_cannot_be_added_is_refused_in_a_line(copied, cli, mine, spoil, said):
    run = spoil(mine[0])
    refused = cli(*WORDS, "--output", copied, "--add", run if isinstance(run, Path) else mine[0])
    assert said in refused.refusal
