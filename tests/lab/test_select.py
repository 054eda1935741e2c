"""`snapcore predict` and `select`, and calibrated scores: what is fitted on images kept back, and only there."""

import json
import logging

import numpy as np
import pytest
import torch

from snapcore import DataError
from snapcore.ensemble import (
    Predictions,
    Recipe,
    combine,
    fit_temperature,
    fit_weights,
    run_cascade,
    score_predictions,
    select,
)
from snapcore.lab import predictions as module
from snapcore.lab.cli import run as command
from snapcore.lab.datasets import load_data
from snapcore.lab.evaluate import evaluate, select_members
from snapcore.metrics import score

from .conftest import SHORT, copy_of


def trained(directory, share):
    torch.set_num_threads(1)
    assert command(["train", *SHORT, "--held-out", str(share), "--output", str(directory)]) == 0
    return directory


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The directory of a run with some 540 images kept back; copy it."""
    return trained(tmp_path_factory.mktemp("lab") / "many", 0.4)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The same with some 130; copy it."""
    return trained(tmp_path_factory.mktemp("lab") / "few", 0.1)


@pytest.fixture
def no_forward_pass(monkeypatch):
    """From now on a member that is run is a failure."""

    def refuse():
        def fail(*args):
            raise AssertionError("a member was run")

        monkeypatch.setattr(module, "start_backend", fail)

    return refuse


def kept(run, split):
    return Predictions.open(run / "predictions" / f"{split}.safetensors")


@pytest.mark.parametrize(("words", "split"), [((), "test"), (("--split", "held-out"), "held-out")])
def test_predict_keeps_log_probabilities_in_the_run(cli, here, many, words, split):
    run = copy_of(many, here / "run")
    done = cli("predict", run, *words)
    assert (done.code, done.err) == (0, "")
    found, data = kept(run, split), load_data("digits", held_out=0.4)
    labels = data.y_test if split == "test" else data.y_held_out
    np.testing.assert_array_equal(found.labels, labels)
    assert found.shape == (3, len(labels), 10)
    where = run / "predictions" / f"{split}.safetensors"
    assert done.out == f"{where}: log-probabilities of 3 members, {len(labels)} examples, 10 classes\n"


def test_a_second_evaluate_of_an_unchanged_run_runs_no_member(cli, here, many, no_forward_pass):
    run = copy_of(many, here / "run")
    first = evaluate([run])
    no_forward_pass()
    again = evaluate([run])
    assert {**again, "seconds": 0, "threads": 0} == {**first, "seconds": 0, "threads": 0}
    assert cli("evaluate", run).code == 0
    assert cli("select", run).code == 0
    assert evaluate([run], last=1)["ensemble"][0] == first["ensemble"][0]
    with pytest.raises(AssertionError, match="a member was run"):
        evaluate([copy_of(many, here / "other")])


def test_training_leaves_the_predictions_that_it_was_scored_by(many):
    curve = json.loads((many / "results.json").read_text())["ensemble"]
    assert score_predictions(kept(many, "test"))["nll"] == pytest.approx(curve[-1]["nll"])


def test_a_calibrated_column_is_the_nll_at_the_temperature_of_the_images_kept_back(many):
    held_out, test = kept(many, "held-out"), kept(many, "test")
    for row in json.loads((many / "results.json").read_text())["ensemble"]:
        m = row["m"]
        temperature = fit_temperature(Predictions(held_out[-m:], held_out.labels)).temperature
        assert row["temperature"] == pytest.approx(temperature)
        logs = combine(test[-m:], log=True).astype(np.float64) / temperature
        nats = np.log(np.exp(logs).sum(axis=1)) - logs[range(len(logs)), test.labels]
        assert row["calibrated_nll"] == pytest.approx(nats.mean(), rel=1e-5)


def test_a_run_that_kept_nothing_back_has_no_calibrated_column(cli, here, many, finished):
    assert set(evaluate([finished])["ensemble"][0]) == {"m", "error", "nll", "brier", "ece"}
    assert set(evaluate([finished, many])["ensemble"][0]) == {"m", "error", "nll", "brier", "ece"}
    assert "calibrated_nll" in evaluate([many, many])["ensemble"][-1]


def test_runs_that_kept_other_images_back_are_not_calibrated_together(many, few):
    assert "temperature" not in evaluate([many, few])["ensemble"][0]


@pytest.mark.parametrize(
    ("by", "fit"), [("select", select), ("weights", fit_weights), ("equal", lambda made: Recipe((1.0,) * len(made)))]
)
def test_select_writes_the_recipe_that_the_images_kept_back_ask_for(cli, here, many, by, fit):
    run = copy_of(many, here / "run")
    done = cli("select", run, "--by", by)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"wrote {run / 'recipe.json'}\n")
    found, held_out, test = Recipe.open(run / "recipe.json"), kept(run, "held-out"), kept(run, "test")
    expected = fit_temperature(held_out, fit(held_out))
    assert found.weights == pytest.approx(expected.weights)
    assert found.temperature == pytest.approx(expected.temperature)
    assert found.members == test.members
    assert (found.fitted.rows, found.fitted.split, found.fitted.how) == (held_out.rows, "held-out", "in-sample")
    gain = score_predictions(test)["nll"] - score(found.apply(test), test.labels, log=True)["nll"]
    assert found.fitted.test == pytest.approx(gain, abs=1e-6)


def test_a_cascade_is_scored_with_what_it_asks(here, many):
    run = copy_of(many, here / "run")
    recipe, report = select_members(run, by="equal", tolerance=1.0, rule="margin")
    logs, used = run_cascade(kept(run, "test"), recipe)
    assert recipe.cascade.rule == "margin"
    assert report["cascade"]["members_used"] == pytest.approx(used.mean())
    assert report["cascade"]["nll"] == pytest.approx(score(logs, kept(run, "test").labels, log=True)["nll"])


def test_few_images_that_show_no_gain_leave_members_as_they_are_and_that_is_said(here, few, monkeypatch, caplog):
    from snapcore.lab import evaluate as lab

    run = copy_of(few, here / "run")
    caplog.set_level(logging.INFO, "snapcore")
    monkeypatch.setattr(lab, "FEW", 10_000)
    monkeypatch.setattr("snapcore.ensemble.fitting._cross_fitted_gain", lambda *_: -0.1)
    recipe, _ = select_members(run)
    assert (recipe.weights, recipe.temperature, recipe.fitted) == ((pytest.approx(1 / 3),) * 3, 1.0, None)
    assert f"without weights, of which {kept(run, 'held-out').examples} held-out examples show no gain" in caplog.text
    assert "without a temperature" in caplog.text
    assert all("temperature" not in row for row in evaluate([run])["ensemble"])


def test_a_temperature_that_runs_off_is_said_and_not_fitted(here, many, monkeypatch, caplog):
    run = copy_of(many, here / "run")
    evaluate([run])
    found = kept(run, "held-out")
    right = np.log(np.full((3, found.examples, 10), 0.01) + 0.9 * np.eye(10)[found.labels])
    facts = {"split": found.split, "data": found.data, "members": found.members}
    Predictions(right, found.labels, **facts).save(run / "predictions" / "held-out.safetensors")
    caplog.set_level(logging.INFO, "snapcore")
    recipe, _ = select_members(run)
    assert recipe.temperature == 1.0
    assert "has no temperature: the temperature runs off to 0" in caplog.text
    assert all("temperature" not in row for row in evaluate([run])["ensemble"])


def test_nothing_is_selected_without_images_kept_back(cli, finished, here):
    run = copy_of(finished, here / "run")
    for words in (["select", run], ["predict", run, "--split", "held-out"]):
        assert "kept no training images back: train with --held-out 0.1" in cli(*words).refusal


def test_what_select_does_not_know_is_refused(cli, here, many):
    run = copy_of(many, here / "run")
    assert "must be one of select, weights, equal, got best" in cli("select", run, "--by", "best").refusal
    assert "must be one of probability, margin, interval, got luck" in cli("select", run, "--rule", "luck").refusal
    assert "rule must be one of" in cli("select", run, "--tolerance", "1", "--rule", "best").refusal
    assert "--tolerance" in cli("select", run, "--tolerance", "-1").refusal
    assert "split must be one of test, held-out, got 'train'" in cli("predict", run, "--split", "train").refusal
    (run / "recipe.json").write_text("mine")
    assert "recipe.json is not snapcore's, and is not replaced" in cli("select", run).refusal
    assert (run / "recipe.json").read_text() == "mine"
    assert "holds no job.json" in cli("select", here / "nothing").refusal


def test_somebodys_own_recipe_is_refused_before_anything_is_fitted(cli, here, many, monkeypatch):
    run = copy_of(many, here / "run")
    (run / "recipe.json").write_text("flour, water, salt")
    monkeypatch.setattr("snapcore.lab.cli.select_members", None)  # which is not called
    assert "recipe.json is not snapcore's, and is not replaced" in cli("select", run).refusal
    assert (run / "recipe.json").read_text() == "flour, water, salt"


def test_a_run_that_cannot_be_written_to_is_evaluated_all_the_same(here, many):
    run = copy_of(many, here / "run")
    (run / "predictions").touch()  # a file where the folder would be: not even root can write into it
    expected = json.loads((many / "results.json").read_text())["ensemble"]
    assert evaluate([run])["ensemble"] == expected


# --- which images are kept back


def test_the_same_share_of_each_class_is_kept_back_and_nothing_is_lost():
    whole, split = load_data("digits"), load_data("digits", held_out=0.25)
    assert len(split.y_train) + len(split.y_held_out) == len(whole.y_train)
    for number in range(10):
        count = np.count_nonzero(whole.y_train == number)
        assert np.count_nonzero(split.y_held_out == number) == round(0.25 * count)
    np.testing.assert_array_equal(split.y_test, whole.y_test)
    assert split.sha256 == whole.sha256
    both = np.concatenate([split.x_train, split.x_held_out]) * split.std + split.mean
    np.testing.assert_allclose(
        np.sort(both.reshape(len(both), -1).sum(axis=1)),
        np.sort((whole.x_train * whole.std + whole.mean).reshape(len(both), -1).sum(axis=1)),
        rtol=1e-4,
    )
    np.testing.assert_allclose([split.x_train.mean(), split.x_train.std()], [0, 1], atol=1e-4)  # of what is trained on


def test_the_seed_decides_which_images_are_kept_back():
    one, same, other = (load_data("digits", held_out=0.1, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.x_held_out, same.x_held_out)
    assert not np.array_equal(one.x_held_out, other.x_held_out)
    assert load_data("digits").x_held_out.shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (1.0, r"held_out must be a share in 0\.\.1, 1 excluded, got 1\.0"),
        (-0.1, "got -0.1"),
        (0.0001, "keeps none of 1347 examples back: raise it"),
        (0.9999, "leaves no example to train on: lower it"),
    ],
)
def test_a_share_that_leaves_nothing_is_refused(share, message):
    with pytest.raises(DataError, match=message):
        load_data("digits", held_out=share)


def test_the_command_names_a_share_that_leaves_nothing(cli, here):
    refusal = cli("train", *SHORT, "--held-out", "0.0001", "--output", "run").refusal
    assert "held_out=0.0001 keeps none" in refusal
    assert list(here.iterdir()) == []
