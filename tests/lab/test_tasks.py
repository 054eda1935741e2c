"""Tasks other than classes on the command line: what the data ask for, what is kept, scored, selected and refused."""

import json

import numpy as np
import pytest
import torch

from snapcore import DataError
from snapcore.ensemble import Predictions, Recipe, rank_correlation, score_predictions, select, uncertainty
from snapcore.lab.cli import run as command
from snapcore.lab.datasets import load_data
from snapcore.lab.job import Job, load_job
from snapcore.lab.sealed import read_sealed, write_sealed
from snapcore.store import SnapshotStore

from .conftest import copy_of
from .test_vader import sdist

rng = np.random.default_rng(11)
X = rng.normal(size=(400, 6))
SIGNAL = X @ rng.normal(size=(6, 3))
TARGETS = {
    "classes": (SIGNAL.argmax(axis=1), "cross-entropy"),
    "labels": ((SIGNAL > 0).astype(np.int64), "binary-cross-entropy"),
    "values": (SIGNAL[:, 0] + 0.1 * rng.normal(size=400), "squared-error"),
    "several values": (SIGNAL + 0.1 * rng.normal(size=(400, 3)), "squared-error"),
    "gaussian": (SIGNAL[:, 0] + 0.1 * rng.normal(size=400), "gaussian-nll"),
}
SCORES = {
    "cross-entropy": {"error", "nll", "brier", "ece"},
    "binary-cross-entropy": {"error", "nll", "brier", "ece"},
    "squared-error": {"rmse"},
    "gaussian-nll": {"rmse", "nll", "crps"},
}
WORDS = ("--model", "mlp", "--epochs", "8", "--cycles", "2", "--lr", "0.02", "--batch-size", "20", "--held-out", "0.2")


def write(folder, y, x=X, name="mine.npz"):
    np.savez(folder / name, x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])
    return folder / name


def trained(folder, kind, *words):
    torch.set_num_threads(1)
    y, loss = TARGETS[kind]
    given = ["--loss", loss] if kind == "gaussian" else []
    data = ["--data", "mine", "--data-dir", str(write(folder, y)), *given]
    assert command(["train", *data, *WORDS, *words, "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module", params=TARGETS)
def task(request, tmp_path_factory):
    """The loss and the run of each kind of task, with a recipe; copy it."""
    return TARGETS[request.param][1], trained(tmp_path_factory.mktemp("task"), request.param, "--recipe")


def test_the_job_keeps_the_loss_and_the_task_that_the_data_are_for(task):
    loss, run = task
    job = load_job(run)
    assert job.loss == loss
    assert job.task == job.dataset().kind
    found = read_sealed(run / "results.json")
    assert (found["loss"], found["task"]) == (loss, job.task)


def test_members_and_ensembles_have_the_scores_of_their_kind_and_learn(task):
    loss, run = task
    found = read_sealed(run / "results.json")
    for row in [*found["members"], *found["ensemble"]]:
        assert SCORES[loss] == row.keys() - {"index", "step", "lr", "m", "temperature", "calibrated_nll"}
    last = found["ensemble"][-1]
    assert last["error"] < 30 if "error" in last else last["rmse"] < 0.5 * load_job(run).dataset().y_test.std()
    for member, row in zip(SnapshotStore(run).members, found["members"], strict=True):
        assert {name: row[name] for name in SCORES[loss]} == pytest.approx(member.metrics, rel=1e-4)


def test_what_is_kept_are_predictions_whose_own_scores_are_those_of_the_results(task):
    loss, run = task
    found = read_sealed(run / "results.json")
    kept = Predictions.open(run / "predictions" / "test.safetensors")
    np.testing.assert_array_equal(kept.labels, load_job(run).dataset().y_test)
    assert score_predictions(kept) == pytest.approx({name: found["ensemble"][-1][name] for name in SCORES[loss]})


def test_only_what_has_probabilities_has_a_temperature(task):
    loss, run = task
    kept, recipe = Predictions.open(run / "predictions" / "test.safetensors"), Recipe.open(run / "recipe.json")
    rows = [row for row in read_sealed(run / "results.json")["ensemble"] if "temperature" in row]
    if "ece" not in SCORES[loss]:
        assert (rows, recipe.temperature) == ([], 1.0)
    else:
        assert rows
        for row in rows:
            last = Predictions(kept[-row["m"] :], kept.labels, kind=kept.kind)
            scored = score_predictions(last, temperature=row["temperature"])
            assert row["calibrated_nll"] == pytest.approx(scored["nll"])


def test_training_with_a_recipe_leaves_what_select_would_write(task, cli, here):
    _, run = task
    expected = (run / "recipe.json").read_text()
    again = copy_of(run, here / "again")
    (again / "recipe.json").unlink()
    assert cli("select", again).code == 0
    assert json.loads((again / "recipe.json").read_text())["weights"] == json.loads(expected)["weights"]


def test_a_second_evaluate_gives_the_same_results_and_runs_no_member(task, cli, here, monkeypatch):
    _, run = task
    again = here / "again"
    copy_of(run, again)
    assert cli("evaluate", again).code == 0
    first = read_sealed(again / "results.json")
    monkeypatch.setattr("snapcore.lab.predictions.start_backend", None)  # which is not called
    assert cli("evaluate", again).code == 0
    for name in ("members", "ensemble", "task", "loss"):
        assert read_sealed(again / "results.json")[name] == first[name]


def test_a_cascade_is_refused_by_name_but_for_one_class_an_example(task, cli, here):
    loss, run = task
    done = cli("select", copy_of(run, here / "again"), "--tolerance", "1")
    if loss == "cross-entropy":
        assert done.code == 0
    else:
        assert "--tolerance is of a cascade" in done.refusal
        assert load_job(run).task in done.refusal


def test_what_select_chooses_of_values_is_what_the_library_chooses(tmp_path, capsys):
    run = trained(tmp_path, "values", "--recipe")
    held_out = Predictions.open(run / "predictions" / "held-out.safetensors")
    recipe = Recipe.open(run / "recipe.json")
    shown = capsys.readouterr().out
    assert f"gain on {held_out.rows} held-out rows" in shown or "without weights" in shown
    assert "of RMSE" in shown or recipe.fitted is None
    assert "temperature" not in shown
    library = select(held_out)
    assert recipe.weights == pytest.approx(library.weights if library.fitted.gain > 0 else (0.5, 0.5))


# what the labels say


@pytest.mark.parametrize(
    ("y", "loss", "kind"),
    [
        (TARGETS["classes"][0], None, "classes"),
        (TARGETS["labels"][0], None, "labels"),
        (TARGETS["labels"][0].astype(bool), None, "labels"),
        (TARGETS["labels"][0].astype(float), "binary-cross-entropy", "labels"),
        (TARGETS["values"][0], None, "values"),
        (TARGETS["values"][0][:, None], None, "values"),
        (TARGETS["several values"][0], "gaussian-nll", "gaussian"),
        (TARGETS["classes"][0], "squared-error", "values"),
    ],
)
def test_the_labels_type_or_the_loss_says_what_kind_of_task_it_is(y, loss, kind, tmp_path):
    data = load_data("mine", write(tmp_path, y), loss=loss)
    assert data.kind == kind
    width = 1 if y.ndim == 1 else y.shape[1]
    assert data.n_classes == (3 if kind == "classes" else width)
    assert data.y_train.shape == ((300,) if width == 1 else (300, width))
    np.testing.assert_allclose(data.y_test, y[300:].reshape(data.y_test.shape), rtol=1e-6)


COUNTS = rng.poisson(4, 400) * 2 + 1
REFUSED = {
    "counts": (COUNTS, None, "pass --loss cross-entropy if they are classes, or squared-error if they are counts"),
    "a matrix of counts": (
        np.stack([COUNTS, COUNTS], 1),
        None,
        "for a class at every position, or squared-error for values",
    ),
    "a loss that is none": (COUNTS, "hinge", "loss must be one of cross-entropy, .*, got 'hinge'"),
    "floats as classes": (SIGNAL[:, 0], "cross-entropy", "training labels must be integers"),
    "values as labels": (SIGNAL, "binary-cross-entropy", "training labels must be 0 or 1"),
    "words": (np.array(["a"] * 400), "squared-error", "training values must be finite numbers"),
    "NaN": (np.where(np.arange(400) == 7, np.nan, 1.0), None, "training values must be finite numbers"),
    "too large for float32": (np.full(400, 1e300), None, "training values must be finite numbers"),
}


@pytest.mark.parametrize(("y", "loss", "message"), REFUSED.values(), ids=REFUSED)
def test_labels_that_do_not_say_it_or_do_not_fit_are_refused(y, loss, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_data("mine", write(tmp_path, y), loss=loss)


def test_counts_are_values_or_classes_once_it_is_said(tmp_path):
    path = write(tmp_path, COUNTS)
    assert load_data("mine", path, loss="squared-error").y_train.dtype == np.float32
    assert load_data("mine", path, loss="cross-entropy").n_classes == COUNTS.max() + 1


def test_parts_with_other_labels_are_refused(tmp_path):
    y = TARGETS["several values"][0]
    np.savez(tmp_path / "a.npz", x_train=X[:300], y_train=y[:300], x_test=X[300:], y_test=y[300:, :2])
    with pytest.raises(DataError, match=r"must have one shape, got \[300, 3\] and \[100, 2\]"):
        load_data("mine", tmp_path / "a.npz")


def test_vectors_are_standardised_one_feature_at_a_time(tmp_path):
    data = load_data("mine", write(tmp_path, TARGETS["values"][0], X * np.arange(1, 7) + 5))
    np.testing.assert_allclose(data.x_train.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(data.x_train.std(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_a_share_of_all_is_kept_back_where_there_are_no_classes(kind, tmp_path):
    data = load_data("mine", write(tmp_path, TARGETS[kind][0]), held_out=0.1, seed=3)
    assert (len(data.y_train), len(data.y_held_out)) == (270, 30)


# jobs


def test_a_run_from_before_there_were_losses_is_of_classes(cli, here, finished):
    run = copy_of(finished, here / "run")
    old = {name: value for name, value in read_sealed(run / "job.json").items() if name not in {"loss", "task"}}
    write_sealed(run / "job.json", old)
    assert (load_job(run).loss, load_job(run).task) == ("cross-entropy", "classes")
    assert cli("evaluate", run).code == 0
    done = cli("train", "--model", "mlp", "--epochs", "3", "--cycles", "3", "--output", run)
    assert "holds a run that is finished" in done.refusal


def test_a_run_is_not_resumed_with_another_loss(task, cli):
    loss, run = task
    other = "squared-error" if loss == "gaussian-nll" else "gaussian-nll"
    data = run.parent / "mine.npz"
    done = cli("train", "--data", "mine", "--data-dir", data, *WORDS, "--loss", other, "--output", run)
    assert ("holds a run with" in done.refusal) or ("labels" in done.refusal)
    if loss in {"squared-error", "gaussian-nll"}:
        assert f"'loss': '{loss}'" in done.refusal


@pytest.mark.parametrize(
    ("change", "message"),
    [({"loss": "hinge"}, "loss must be one of"), ({"loss": "squared-error"}, "task must be values")],
)
def test_a_job_whose_loss_and_task_do_not_fit_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        Job(backend="torch", **change)


def test_a_recipe_needs_examples_that_were_kept_back(cli, here):
    assert "add --held-out 0.1" in cli("train", "--recipe").refusal
    assert list(here.iterdir()) == []


def test_a_recipe_of_ones_own_is_refused_before_training(cli, here):
    (here / "run").mkdir()
    (here / "run" / "recipe.json").write_text("flour, water, salt")
    done = cli("train", "--model", "mlp", "--held-out", "0.1", "--recipe", "--output", "run")
    assert "recipe.json is not snapcore's, and is not replaced" in done.refusal
    assert [path.name for path in (here / "run").iterdir()] == ["recipe.json"]


def test_runs_for_different_tasks_are_not_evaluated_together(cli, here, tmp_path):
    for loss in ("squared-error", "gaussian-nll"):
        data = ("--data", "mine", "--data-dir", write(here, TARGETS["values"][0]), "--loss", loss)
        assert cli("train", *data, *WORDS, "--output", loss).code == 0
    assert "give runs on the same data and task" in cli("evaluate", "squared-error", "gaussian-nll").refusal


# models


OWN = """
from torch import nn
from snapcore_torch.models import mlp

def whole(input_shape, n_outputs):
    return mlp(input_shape, n_outputs)

def half(input_shape, n_outputs):
    return mlp(input_shape, max(1, n_outputs // 2))
"""


@pytest.fixture
def own(here, monkeypatch):
    (here / "mymodels.py").write_text(OWN)
    monkeypatch.syspath_prepend(here)
    return "mymodels"


def test_a_model_of_ones_own_gives_a_mean_and_a_variance(own, cli, here):
    data = ("--data", "mine", "--data-dir", write(here, TARGETS["gaussian"][0]), "--loss", "gaussian-nll")
    assert cli("train", *data, *WORDS, "--model", f"{own}:whole", "--output", "run").code == 0
    done = cli("train", *data, *WORDS, "--model", f"{own}:half", "--output", "other")
    assert "must return [batch, 2] for loss='gaussian-nll'" in done.err.splitlines()[-1]
    assert not (here / "other").exists()


DENSE = ("--data", "digits-dense", "--epochs", "1", "--cycles", "1", "--train-limit", "64")


def test_a_class_for_each_pixel_is_trained_scored_and_selected(cli, here):
    words = ("--held-out", "0.25", "--recipe", "--batch-size", "16")
    done = cli("train", *DENSE, *words, "--model", "fcn", "--output", "run")
    assert done.code == 0
    assert "48 training images" in done.out
    kept = Predictions.open(here / "run" / "predictions" / "test.safetensors")
    assert (kept.shape, kept.ignore) == ((1, 450, 16, 16, 11), 255)
    counts = kept.labels != 255
    wrong = kept[0].argmax(axis=-1)[counts] != kept.labels[counts]
    found = read_sealed(here / "run" / "results.json")["ensemble"][0]
    assert found["error"] == pytest.approx(100 * wrong.mean())
    assert "a class for each pixel" in cli("select", "run", "--tolerance", "1").refusal
    assert "450 examples, 16, 16, 11 classes" in cli("predict", "run").out


def test_a_model_with_one_answer_a_picture_is_refused_for_pixels(own, cli, here):
    before = sorted(path.name for path in here.iterdir())
    done = cli("train", *DENSE, "--model", f"{own}:whole", "--output", "run")
    assert done.code == 1
    assert "16, 16" in done.err.splitlines()[-1]
    assert not (here / "run").exists()
    assert set(before) <= {path.name for path in here.iterdir()}


# the spread between people


def test_the_uncertainty_is_ranked_beside_the_spread_between_people(cli, here):
    words = ("--model", "mlp", "--epochs", "2", "--cycles", "2", "--lr", "0.001", "--batch-size", "16")
    done = cli("train", "--data", "vader", "--data-dir", sdist(here), *words, "--output", "run")
    assert done.code == 0
    found = read_sealed(here / "run" / "results.json")["spread_correlation"]
    kept = Predictions.open(here / "run" / "predictions" / "test.safetensors")
    spread = load_data("vader", here / "vaderSentiment-3.3.2.tar.gz").spread
    parts = uncertainty(kept)
    for name, value in found.items():
        assert value == pytest.approx(rank_correlation(getattr(parts, name), spread), abs=1e-9)
    line = f"rank correlation of the uncertainty with the spread between people: total {found['total']:.3f}, "
    assert line in done.out
    assert line in cli("evaluate", "run").out


def test_a_class_for_every_pixel_of_ones_own_leads_to_scores_and_a_recipe(cli, here):
    """Bright pixels are class 1: a network that sees each pixel learns it, and the border does not count."""
    x = np.random.default_rng(0).integers(0, 256, size=(200, 6, 6), dtype=np.uint8)
    y = (x > 127).astype(np.int64)
    y[:, 0] = -100
    np.savez(here / "mine.npz", x_train=x[:160], y_train=y[:160], x_test=x[160:], y_test=y[160:], ignore=np.array(-100))
    words = (
        "--data",
        "mine",
        "--data-dir",
        "mine.npz",
        "--model",
        "fcn",
        "--epochs",
        "6",
        "--cycles",
        "2",
        "--lr",
        "0.05",
    )
    trained = cli(
        "train", "--backend", "torch", *words, "--batch-size", "16", "--held-out", "0.25", "--recipe", "--output", "run"
    )
    assert trained.code == 0, trained.err
    results = json.loads((here / "run" / "results.json").read_text())
    assert results["ensemble"][-1]["error"] < 10
    assert (here / "run" / "recipe.json").exists()
    assert cli("evaluate", "run").code == 0


TOKENS = """
from torch import nn

class Tagger(nn.Module):
    \"\"\"A class for each token, by itself.\"\"\"

    def __init__(self, input_shape, n_outputs):
        super().__init__()
        assert input_shape == (7,)
        self.embedded, self.told = nn.Embedding(12, 16), nn.Linear(16, n_outputs)

    def forward(self, tokens):
        return self.told(self.embedded(tokens))
"""


def test_tokens_with_a_mask_lead_to_perplexity_and_a_recipe(cli, here, monkeypatch):
    """The class of a token is its remainder by 3, and four of ten positions of the last are padding."""
    (here / "tagging.py").write_text(TOKENS)
    monkeypatch.syspath_prepend(here)
    x = np.random.default_rng(0).integers(0, 12, size=(300, 7))
    y = np.where(np.arange(7) < 4, x % 3, -100)
    np.savez(here / "mine.npz", x_train=x[:240], y_train=y[:240], x_test=x[240:], y_test=y[240:], ignore=np.array(-100))
    words = ("--data", "mine", "--data-dir", "mine.npz", "--model", "tagging:Tagger", "--epochs", "8", "--cycles", "2")
    more = ("--batch-size", "16", "--lr", "0.5", "--held-out", "0.25", "--recipe", "--output", "run")
    trained = cli("train", "--backend", "torch", *words, *more)
    assert trained.code == 0, trained.err
    assert "perplexity" in trained.out
    last = json.loads((here / "run" / "results.json").read_text())["ensemble"][-1]
    assert last["error"] == 0
    assert last["perplexity"] == pytest.approx(np.exp(last["nll"]))
    kept = Predictions.open(here / "run" / "predictions" / "test.safetensors")
    assert (kept.shape, kept.ignore, kept.rows) == ((2, 60, 7, 3), -100, 240)
