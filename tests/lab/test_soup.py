"""`snapcore soup`: one member that is the mean of others, which everything takes that takes a run."""

import json

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import update_bn

from snapcore.lab.cli import run as command
from snapcore.lab.datasets import load_data
from snapcore.lab.job import load_job
from snapcore.lab.network import Network
from snapcore.lab.soup import make_soup
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.models import cnn, mlp

from .conftest import copy_of

SMALL = ("--epochs", "3", "--cycles", "3", "--train-limit", "256", "--lr", "0.02")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run with batch normalisation."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("lab") / "trained"
    assert command(["train", *SMALL, "--output", str(directory)]) == 0
    return directory


@pytest.fixture
def apart(here, finished):
    """A run of two members that predict the same, the units of the first one in another order."""
    store, job = SnapshotStore(finished), load_job(finished)
    last, order = store.load(3), np.roll(np.arange(128), 1)
    first = {**last, "1.weight": last["1.weight"][order], "1.bias": last["1.bias"][order]}
    first["3.weight"] = last["3.weight"][:, order]
    job.save(here / "apart")
    with SnapshotStore(here / "apart", "w") as made:
        made.describe(program=store.program)
        for index, weights in enumerate((first, last), 1):
            made.save(weights, index=index, step=21 * index, cycle=index - 1, lr=0.1, framework="torch")
    return here / "apart"


@pytest.mark.parametrize(
    ("words", "indexes"), [((), [1, 2, 3]), (("--last", 2), [2, 3]), (("--members", "1,3"), [1, 3])]
)
def test_the_one_member_is_the_mean_of_those_asked_for(cli, here, finished, words, indexes):
    done = cli("soup", finished, "--output", "mean", "--force", *words)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("wrote mean\n")
    store, made = SnapshotStore(finished), SnapshotStore(here / "mean")
    for name, value in made.load(1).items():
        expected = np.mean([store.load(index)[name].astype(float) for index in indexes], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
    assert len(made.members) == 1
    assert made.members[0].step == store.members[-1].step
    assert made.program == store.program
    assert made.stopped == "the mean of members " + ", ".join(
        f"{i} ({store.members[i - 1].sha256[:12]})" for i in indexes
    )


def test_batch_statistics_are_those_of_the_mean_on_the_training_images(here, trained):
    make_soup(trained, here / "mean", force=True)
    store, network = SnapshotStore(trained), cnn((1, 8, 8), 10)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.copy_(torch.as_tensor(np.mean([store.load(index)[name] for index in (1, 2, 3)], axis=0)))
    update_bn([torch.from_numpy(load_data("digits", train_limit=256).x_train)], network)
    found = SnapshotStore(here / "mean").load(1)
    for name, value in network.state_dict().items():
        if "tracked" not in name:
            np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-5)


def test_what_takes_a_run_takes_it(cli, here, finished):
    assert cli("soup", finished, "--output", "mean", "--force").code == 0
    results = json.loads((here / "mean" / "results.json").read_text())
    ensemble = SnapshotEnsemble.load(here / "mean", mlp((1, 8, 8), 10))
    data = load_data("digits")
    wrong = ensemble(torch.from_numpy(data.x_test)).argmax(-1).numpy() != data.y_test
    assert results["ensemble"][0]["error"] == pytest.approx(100 * wrong.mean())
    assert cli("evaluate", "mean").code == 0
    assert cli("evaluate", "mean", finished, "--output", "both").code == 0
    assert len(json.loads((here / "both" / "results.json").read_text())["members"]) == 4
    assert "the mean of members 1 (" in cli("inspect", "mean").out
    assert cli("verify", "mean").code == 0


def test_its_scores_are_shown_beside_the_best_members_and_the_ensembles(cli, here, finished):
    done = cli("soup", finished, "--output", "mean", "--force")
    before, after = (json.loads((run / "results.json").read_text()) for run in (finished, here / "mean"))
    best = min(before["members"], key=lambda member: member["error"])
    for name, row in (("soup", after["members"][0]), ("best member", best), ("ensemble", before["ensemble"][-1])):
        assert f"{name:<11} error {row['error']:5.2f} %, NLL {row['nll']:.4f}" in done.out


def test_members_with_a_barrier_between_them_are_refused_unless_it_is_forced(cli, here, apart):
    refusal = cli("soup", apart, "--output", "mean").refusal
    assert "members 1 and 2 do not share a basin: a barrier of" in refusal
    assert not (here / "mean").exists()
    assert cli("soup", apart, "--output", "mean", "--force").code == 0


def test_members_of_one_basin_need_no_force(cli, here, finished):
    store, job = SnapshotStore(finished), load_job(finished)
    job.save(here / "near")
    with SnapshotStore(here / "near", "w") as made:
        made.describe(program=store.program)
        for index in (1, 2):
            weights = {name: value * (1 + 0.001 * index) for name, value in store.load(3).items()}
            made.save(weights, index=index, step=21 * index, cycle=index - 1, lr=0.1, framework="torch")
    assert cli("soup", "near", "--output", "mean").code == 0


@pytest.mark.parametrize("kept", [0.25, None])
def test_no_barrier_is_measured_on_test_images(cli, here, monkeypatch, kept):
    words = ("--held-out", kept) if kept else ()
    assert cli("train", "--model", "mlp", "--epochs", 2, "--cycles", 2, *words, "--output", "run").code == 0
    seen, scores = [], Network.scores

    def watched(network, x, y):
        seen.append(x)
        return scores(network, x, y)

    monkeypatch.setattr(Network, "scores", watched)
    cli("soup", "run", "--output", "mean")  # refused or not
    data = load_data("digits", held_out=kept or 0.0)
    barrier = data.x_held_out if kept else data.x_train
    assert len(seen) >= 5
    rows = {each.tobytes() for each in barrier}
    assert all(each.tobytes() in rows for each in np.concatenate(seen[:5]))


def test_what_cannot_be_averaged_is_refused(cli, here, finished):
    assert (
        "at least two members are required for a mean, got 1"
        in cli("soup", finished, "--output", "a", "--last", 1).refusal
    )
    assert "last must be in 1..3" in cli("soup", finished, "--output", "a", "--last", 4).refusal
    assert "members must be indexes" in cli("soup", finished, "--output", "a", "--members", "x").refusal
    assert not (here / "a").exists()


def test_no_run_and_nobodys_file_is_replaced(cli, here, finished):
    run = copy_of(finished, here / "run")
    assert "run holds a run already: choose another --output" in cli("soup", run, "--output", run).refusal
    for name in ("job.json", "results.json"):
        (here / "mine").mkdir(exist_ok=True)
        (here / "mine" / name).write_text("mine")
        assert f"{name} is not snapcore's" in cli("soup", run, "--output", "mine").refusal
        assert (here / "mine" / name).read_text() == "mine"
        (here / "mine" / name).unlink()


@pytest.mark.parametrize("words", [("soup", "--output", "new"), ("diversity",)], ids=["soup", "diversity"])
def test_a_run_of_another_task_is_refused_before_anything_is_run(cli, here, words):
    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    np.savez(here / "rows.npz", x_train=x, y_train=x.sum(axis=1), x_test=x[:9], y_test=x[:9].sum(axis=1))
    trained = (
        "--data",
        "rows",
        "--data-dir",
        "rows.npz",
        "--model",
        "mlp",
        "--epochs",
        "4",
        "--cycles",
        "2",
        "--lr",
        "0.01",
    )
    assert cli("train", *trained, "--batch-size", "8", "--output", "values").code == 0
    refused = cli(words[0], "values", *words[1:])
    assert "needs members that tell classes apart, got a run of values: choose another run" in refused.refusal
    assert not (here / "new").exists()
    assert not (here / "values" / "diversity.json").exists()
