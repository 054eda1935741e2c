"""`snapcore evaluate`: the scores are those that others compute, of one run or of several."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

from snapcore import DataError
from snapcore.lab.datasets import load_data
from snapcore.lab.evaluate import evaluate
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.models import mlp


def own_scores(probabilities, labels):
    """Compute error, NLL and Brier score with scikit-learn and by definition."""
    probabilities = probabilities.astype(float)
    probabilities /= probabilities.sum(-1, keepdims=True)
    return {
        "error": 100 * (1 - accuracy_score(labels, probabilities.argmax(-1))),
        "nll": log_loss(labels, probabilities, labels=range(10)),
        "brier": np.mean(np.sum((probabilities - np.eye(10)[labels]) ** 2, axis=-1)),
    }


def members_of(directories, last=None):
    import torch

    data = load_data("digits")
    ensemble = SnapshotEnsemble.load(directories, mlp((1, 8, 8), 10), last=last)
    with torch.inference_mode():
        return ensemble.members(torch.from_numpy(data.x_test)).numpy(), data.y_test


def assert_scores_are(found, members, labels):
    assert len(found["members"]) == len(members)
    for row, probabilities in zip(found["members"], members, strict=True):
        assert {name: row[name] for name in ("error", "nll", "brier")} == pytest.approx(
            own_scores(probabilities, labels), rel=1e-5
        )
    for row in found["ensemble"]:
        mean = members[-row["m"] :].mean(axis=0)
        assert {name: row[name] for name in ("error", "nll", "brier")} == pytest.approx(
            own_scores(mean, labels), rel=1e-5
        )


def test_the_scores_of_a_run_are_those_of_pytorch_and_scikit_learn(finished, results):
    assert_scores_are(results(finished), *members_of(finished))


def test_scoring_a_run_again_gives_what_training_it_gave(cli, here, finished, results):
    done = cli("evaluate", finished, "--output", "scores")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("wrote scores/results.json\n")
    assert results(here / "scores") == results(finished)


def test_the_members_of_several_runs_form_one_ensemble(cli, here, finished, other_seed, results):
    assert cli("evaluate", finished, other_seed, "--output", "both").code == 0
    found = results(here / "both")
    assert_scores_are(found, *members_of([finished, other_seed]))
    assert found["members"] == results(finished)["members"] + results(other_seed)["members"]
    assert found["updates"] == 126
    assert (found["backend"], found["data"], found["model"], found["method"]) == ("torch", "digits", "mlp", "snapshot")


def test_last_counts_in_each_run(cli, here, finished, other_seed, results):
    assert cli("evaluate", finished, other_seed, "--last", "2", "--output", "both").code == 0
    found = results(here / "both")
    assert [member["index"] for member in found["members"]] == [2, 3, 2, 3]
    assert_scores_are(found, *members_of([finished, other_seed], last=2))


def test_runs_of_different_methods_and_models_are_named_together(cli, here, finished, results):
    assert cli("train", "--epochs", "1", "--cycles", "1", "--method", "cosine", "--output", "cosine").code == 0
    assert cli("evaluate", "cosine", finished, "--output", "both").code == 0
    found = results(here / "both")
    assert (found["data"], found["model"], found["method"]) == ("digits", "cnn+mlp", "cosine+snapshot")
    assert found["updates"] == 21 + 63


def test_the_scores_of_several_runs_go_to_a_numbered_directory(cli, here, finished, other_seed, results):
    for name in ("evaluation", "evaluation-2"):
        assert cli("evaluate", finished, other_seed).out.endswith(f"wrote runs/{name}/results.json\n")
        assert len(results(here / "runs" / name)["members"]) == 6


@pytest.mark.parametrize("last", [0, 4])
def test_more_members_than_there_are_cannot_be_scored(last, cli, finished):
    done = cli("evaluate", finished, "--last", last)
    assert done.code == (1 if last else 2)
    assert ("last must be in 1..3, the finished members of" if last else "--last") in done.refusal


def test_runs_on_different_images_are_refused_by_name(cli, here, finished):
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 8, 8)), np.arange(64) % 10
    np.savez(here / "noise.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    words = ("--model", "mlp", "--epochs", "1", "--cycles", "1", "--data", "noise", "--data-dir", "noise.npz")
    assert cli("train", *words, "--output", "noise").code == 0
    done = cli("evaluate", finished, "noise")
    assert (done.code, done.out) == (1, "")
    assert f"{finished} (digits) and noise (noise) were tested on different images" in done.refusal
    assert "one at a time" in done.refusal


def test_an_altered_member_is_not_scored(cli, here, stopping):
    assert cli("train", "--model", "mlp", "--epochs", "1", "--cycles", "1", "--output", "run").code == 0
    file = here / "run" / "snapshot-001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = cli("evaluate", "run")
    assert done.code == 1
    assert "snapshot-001.safetensors does not have the SHA-256 that was recorded" in done.refusal


def test_the_function_behind_the_command_raises_the_errors_of_the_tree(here, finished):
    (here / "job.json").write_text((finished / "job.json").read_text().replace('"digits"', '"gone"'))
    with pytest.raises(DataError, match="got 'gone'"):
        evaluate([here])
