"""`snapcore diversity`, figures 5 and 6 of the paper: against NumPy on kept predictions and PyTorch on the weights."""

import json

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import update_bn

from snapcore.ensemble import Predictions
from snapcore.lab import predictions as module
from snapcore.lab.cli import run as command
from snapcore.lab.datasets import load_data
from snapcore.lab.diversity import measure_diversity
from snapcore.lab.ours import is_ours
from snapcore.metrics import score
from snapcore.store import SnapshotStore
from snapcore_torch.models import cnn

from .conftest import copy_of

SMALL = ("--epochs", "3", "--cycles", "3", "--train-limit", "256", "--lr", "0.05")  # 12 updates of a cnn, three members


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run with batch normalisation; copy it."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("lab") / "trained"
    assert command(["train", *SMALL, "--output", str(directory)]) == 0
    return directory


def weights_between(run, one, other, share):
    """Return PyTorch's network with weights in between."""
    first, second = (SnapshotStore(run).load(index) for index in (one, other))
    network = cnn((1, 8, 8), 10)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            ends = [torch.from_numpy(np.asarray(each[name])) for each in (first, second)]
            value.copy_(ends[1] if "tracked" in name else ends[0].lerp(ends[1], share))
    return network.eval()


def scores_of(network, data):
    with torch.inference_mode():
        p = network(torch.from_numpy(data.x_test)).double().softmax(-1).numpy()
    return score(p, data.y_test)


def test_the_command_writes_what_it_prints_and_a_picture(cli, here, finished, monkeypatch):
    run = copy_of(finished, here / "run")
    assert cli("predict", run).code == 0
    monkeypatch.setattr(module, "_run", None)  # no member is run again for its predictions
    done = cli("diversity", run, "--points", 3, "--images", 50)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"wrote {run / 'diversity.json'} and {run / 'diversity.png'}\n")
    assert is_ours(run / "diversity.png")
    found = json.loads((run / "diversity.json").read_text())
    for line in found["interpolation"]["lines"]:
        one, other = line["members"]
        assert f"from member {one} to {other}: error {line['error'][0]:.2f} % and {line['error'][-1]:.2f} %" in done.out
        assert f"barrier {line['barrier']:.2f}\n" in done.out
    for row in found["correlation"]:
        assert " ".join(f"{value:7.3f}" for value in row) in done.out
    assert cli("diversity", run, "--points", 3, "--images", 50).code == 0  # which replaces its own


def test_matrices_are_those_of_the_kept_predictions(here, trained):
    run = copy_of(trained, here / "run")
    found = measure_diversity(run, print, points=3)
    kept = Predictions.open(run / "predictions" / "test.safetensors")
    p, wrong = np.exp(kept[:].astype(float)), kept[:].argmax(-1) != kept.labels
    np.testing.assert_allclose(found["correlation"], np.corrcoef(p.reshape(3, -1)), atol=1e-9)
    for i in range(3):
        for j in range(3):
            apart = np.mean(kept[i].argmax(-1) != kept[j].argmax(-1))
            assert found["disagreement"][i][j] == pytest.approx(apart)
            assert found["double_fault"][i][j] == pytest.approx(np.mean(wrong[i] & wrong[j]))
    store = SnapshotStore(run)
    one, other = (np.concatenate([v.ravel() for v in store.load(i).values() if v.dtype.kind == "f"]) for i in (1, 3))
    assert found["weight_distance"][0][2] == pytest.approx(np.linalg.norm(one - other), rel=1e-5)
    parts = found["ambiguity"]["nll"]
    assert parts["mean_member"] == pytest.approx(np.mean([score(each, kept.labels)["nll"] for each in p]))
    assert parts["ensemble"] == pytest.approx(score(p.mean(0), kept.labels)["nll"])


def test_lines_run_between_neighbours_and_to_the_last_and_end_at_the_members(here, trained):
    found = measure_diversity(copy_of(trained, here / "run"), print, points=3)["interpolation"]
    assert [line["members"] for line in found["lines"]] == [[1, 2], [2, 3], [1, 3]]
    assert (found["shares"], found["images"], found["refreshed_on"]) == ([0.0, 0.5, 1.0], 450, 0)
    members = json.loads((trained / "results.json").read_text())["members"]
    for line in found["lines"]:
        for end, index in zip((0, -1), line["members"], strict=True):
            assert line["error"][end] == pytest.approx(members[index - 1]["error"])
            assert line["nll"][end] == pytest.approx(members[index - 1]["nll"], rel=1e-5)
        rise = line["error"][1] - (line["error"][0] + line["error"][2]) / 2
        assert line["barrier"] == pytest.approx(max(0.0, rise))


@pytest.mark.parametrize("refresh", [False, True])
def test_between_members_lies_what_pytorch_finds_there(here, trained, refresh):
    run = copy_of(trained, here / "run")
    found = measure_diversity(run, print, points=3, refresh=refresh)["interpolation"]
    data = load_data("digits", train_limit=256)
    assert found["refreshed_on"] == (256 if refresh else 0)
    middle = weights_between(run, 1, 3, 0.5)
    if refresh:
        update_bn([torch.from_numpy(data.x_train)], middle)
        middle.eval()
    expected = scores_of(middle, data)
    assert found["lines"][2]["error"][1] == pytest.approx(expected["error"], abs=0.23)  # one image
    assert found["lines"][2]["nll"][1] == pytest.approx(expected["nll"], rel=1e-3)


def test_batch_statistics_of_their_own_make_another_line(here, trained):
    run = copy_of(trained, here / "run")
    plain, refreshed = (measure_diversity(run, print, points=3, refresh=each) for each in (False, True))
    assert plain["interpolation"]["lines"][2]["nll"] != refreshed["interpolation"]["lines"][2]["nll"]


def test_diversity_of_one_member_is_refused(cli, here):
    assert cli("train", "--model", "mlp", "--epochs", 1, "--cycles", 1, "--output", "one").code == 0
    assert "has one finished member, and diversity is of two or more" in cli("diversity", "one").refusal
    assert "--points" in cli("diversity", "one", "--points", 2).refusal


@pytest.mark.parametrize("name", ["diversity.json", "diversity.png"])
def test_somebodys_own_file_is_refused_before_anything_is_measured(cli, here, trained, monkeypatch, name):
    run = copy_of(trained, here / "run")
    (run / name).write_text("mine")
    monkeypatch.setattr("snapcore.lab.cli.measure_diversity", None)  # which is not called
    assert f"{name} is not snapcore's, and is not replaced" in cli("diversity", run).refusal
    assert (run / name).read_text() == "mine"


def test_verify_finds_a_file_that_was_altered(cli, here, trained):
    run = copy_of(trained, here / "run")
    assert cli("diversity", run, "--points", 3, "--images", 9).code == 0
    assert cli("verify", run).code == 0
    path = run / "diversity.json"
    path.write_text(path.read_text().replace('"images": 9', '"images": 8'))
    done = cli("verify", run)
    assert done.code == 1
    assert "diversity.json is damaged" in done.refusal
