"""The options of `train` and `evaluate`: each does what it says, and what a backend cannot do is refused by name."""

import csv
import json
import logging

import numpy as np
import pytest
import torch

from snapcore import CosineCycles, DataError, program
from snapcore.backend import load_backend
from snapcore.lab.job import Job
from snapcore.run import execute
from snapcore.store import SnapshotStore

from .conftest import copy_of

SHORT = ("--model", "mlp", "--epochs", "3", "--cycles", "3")  # 63 updates, members after 21, 42 and 63
BACKENDS = ("torch", "jax", "keras", "tensorflow")

# of the schedule


def test_train_follows_the_schedule_that_schedule_plans(cli, here):
    words = ("--cycles", "4", "--lr", "0.2", "--lr-min", "0.01", "--warmup-steps", "10", "--remainder", "even")
    assert cli("train", "--model", "mlp", "--epochs", "3", *words, "--output", "run").code == 0
    planned = CosineCycles(lr=0.2, steps=63, cycles=4, lr_min=0.01, warmup_steps=10, remainder="even")
    with (here / "run" / "history.csv").open(newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == [planned(step) for step in range(63)]
    assert tuple(member.step for member in SnapshotStore("run").members) == planned.snapshot_steps
    shown = cli("schedule", "--steps", "63", *words).out
    assert [int(line.split()[2]) for line in shown.splitlines()[2:]] == list(planned.snapshot_steps)


@pytest.mark.parametrize("words", [["--lr-min", "0.01"], ["--warmup-steps", "5"], ["--remainder", "even"]])
def test_a_method_without_cosine_cycles_refuses_their_options_by_name(words, cli, here):
    for command in (["train", *SHORT], ["schedule"]):
        message = cli(*command, "--method", "single", *words).refusal
        assert f"single has no cosine cycles, got {words[0]}" in message
    assert list(here.iterdir()) == []


# of the backend


GIVEN = [
    {"momentum": 0.5, "weight_decay": 0.01},
    {"momentum": 0.0},
    {"clip_norm": 0.01},
    {"precision": "bfloat16"},
    {"optimizer": "adamw", "weight_decay": 0.1},
    {"device": "cpu"},
]


@pytest.mark.exhaustive(keep=2)
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_options_reach_the_backend_as_they_were_given(given, cli, here, tensors_of, finished):
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli("train", *SHORT, *words, "--output", "run").code == 0
    job = Job(backend="torch")
    data = job.training_data(job.dataset())
    execute(
        program("snapshot", lr=0.1, steps=63, cycles=3),
        load_backend("torch"),
        model="mlp",
        data=data,
        directory=here / "by hand",
        **given,
    )
    for index in (1, 2, 3):
        ours, theirs = (SnapshotStore(here / name).load(index) for name in ("run", "by hand"))
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert (tensors_of(here / "run") == tensors_of(finished)) == (given == {"device": "cpu"})
    assert json.loads((here / "run" / "job.json").read_text()).items() >= given.items()
    assert cli("evaluate", "run").code == 0


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("jax", ["--clip-norm", "1"]),
        ("jax", ["--device", "cpu"]),
        ("keras", ["--device", "cpu"]),
        ("tensorflow", ["--clip-norm", "1"]),
    ],
)
def test_what_a_backend_cannot_do_is_refused_by_name_before_training(backend, words, cli, here):
    message = cli("train", "--backend", backend, *SHORT, *words, "--output", "run").refusal
    assert f"the backend {backend} has no {words[0]}" in message
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--optimizer", "lion"], ["optimizer must be 'sgd', 'adamw'", "got 'lion'"]),
        (["--optimizer", "adamw", "--momentum", "0.9"], ["--momentum is sgd's", "--optimizer adamw"]),
        (["--precision", "int4"], ["precision must be one of", "got 'int4'"]),
        (["--device", "abacus"], ["device must be one that PyTorch can use", "got 'abacus'"]),
        (["--device", "cuda:99"], ["device must be one that PyTorch can use", "got 'cuda:99'"]),
        (["--device", "meta"], ["device must be one that PyTorch can use", "got 'meta'"]),
        (["--momentum", "nan"], ["--momentum", "less than or equal to 1"]),
        (["--momentum", "1.5"], ["--momentum", "less than or equal to 1"]),
        (["--weight-decay", "inf"], ["weight_decay must be finite", "got inf"]),
        (["--clip-norm", "inf"], ["clip_norm must be finite", "got inf"]),
        (["--clip-norm", "0"], ["clip_norm must be above 0", "got 0.0"]),
    ],
)
def test_a_value_that_cannot_be_is_one_line_before_training(words, fragments, cli, here):
    done = cli("train", *SHORT, *words, "--output", "run")
    assert done.code in {1, 2}
    assert done.out == ""
    for fragment in fragments:
        assert fragment in done.refusal
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_update_of_adamw_is_of_the_rates_size_and_its_decay_is_apart(backend):
    """Adam's first step is lr · g / (|g| + ε), whatever g; what is left of a weight is (1 − lr · decay) of it."""
    rate, decay = 0.01, 0.5
    job = Job(backend=backend)
    chosen, data = load_backend(backend), job.training_data(job.dataset())
    plan = program("snapshot", lr=rate, steps=10, cycles=1)
    state = chosen.init("mlp", data, plan, seed=0, optimizer="adamw", weight_decay=decay)
    before = {name: array.copy() for name, array in chosen.capture(state).resolve().items()}
    after = chosen.capture(chosen.train(state, 0, 1, report=lambda step, loss: None)).resolve()
    moved = np.concatenate([np.abs(after[name] - (1 - rate * decay) * before[name]).ravel() for name in before])
    assert moved.max() == pytest.approx(rate, rel=1e-3)
    assert np.median(moved[moved > rate / 100]) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_that_no_backend_knows_is_refused_by_each(backend):
    job = Job(backend=backend)
    plan = program("snapshot", lr=0.1, steps=10, cycles=1)
    with pytest.raises(DataError, match=r"optimizer must be 'sgd', 'adamw' or a function .*, got 'lion'"):
        load_backend(backend).init("mlp", job.training_data(job.dataset()), plan, seed=0, optimizer="lion")


# of evaluate


def test_members_are_chosen_by_index(cli, here, finished, results):
    whole = results(finished)
    for chosen in ("1,3", "2", "3,1"):
        assert cli("evaluate", finished, "--members", chosen, "--output", "some").code == 0
        found = results(here / "some")
        indexes = [int(word) for word in chosen.split(",")]
        assert found["members"] == [whole["members"][index - 1] for index in indexes]
        assert len(found["ensemble"]) == len(indexes)
    assert cli("evaluate", finished, "--members", "1,2,3", "--output", "some").code == 0
    assert results(here / "some") == whole


@pytest.mark.parametrize(
    ("words", "code", "fragment"),
    [
        (["--members", "1,9"], 1, "members must be of [1, 2, 3], the finished ones of"),
        (["--members", "0"], 1, "got [0]"),
        (["--members", "1,1"], 1, "got [1, 1]"),
        (["--members", "1", "--last", "1"], 1, "last and members exclude each other"),
        (["--members", "one"], 2, "--members"),
        (["--members", ""], 2, "--members"),
    ],
)
def test_members_that_are_not_there_are_refused(words, code, fragment, cli, finished):
    done = cli("evaluate", finished, *words)
    assert done.code == code
    assert fragment in done.refusal


def test_a_damaged_member_can_be_left_out_as_its_message_says(cli, here, stopping):
    assert cli("train", *SHORT, "--output", "run").code == 0
    file = here / "run" / "snapshot-002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert "leave member 2 out" in cli("evaluate", "run").refusal
    assert cli("evaluate", "run", "--members", "1,3").code == 0


def test_a_run_is_scored_on_the_device_that_is_asked_for(cli, here, finished, results):
    assert cli("evaluate", finished, "--device", "cpu", "--output", "scores").code == 0
    assert results(here / "scores") == results(finished)
    again = copy_of(finished, here / "again")
    assert "device must be one that PyTorch can use" in cli("evaluate", again, "--device", "abacus").refusal


@pytest.fixture
def own_data(cli, here):
    """A run on data of one's own, in a folder."""
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 8, 8)), np.arange(64) % 10
    (here / "data").mkdir()
    np.savez(here / "data" / "a.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    words = ("--model", "mlp", "--epochs", "2", "--cycles", "1", "--data", "own", "--data-dir", "data")
    assert cli("train", *words, "--output", "run").code == 0
    return x, y


def test_data_that_were_moved_are_found_by_data_dir(own_data, cli, here, results):
    before = results(here / "run")
    (here / "data").rename(here / "moved")
    assert "data, which does not exist: give the directory" in cli("evaluate", "run").refusal
    done = cli("evaluate", "run", "--data-dir", "moved")
    assert (done.code, done.err) == (0, "")
    assert results(here / "run") == before


def test_data_that_have_changed_are_refused_unless_they_are_asked_for(own_data, cli, here, caplog):
    x, y = own_data
    np.savez(here / "data" / "a.npz", x_train=x, y_train=y, x_test=x[20:40], y_test=y[20:40])
    message = cli("evaluate", "run").refusal
    assert "run was trained on other images than own has now" in message
    assert "--data-dir" in message
    with caplog.at_level(logging.WARNING, "snapcore"):
        assert cli("evaluate", "run", "--data-dir", "data").code == 0
    assert "was trained on other images than those in --data-dir" in caplog.messages[-1]


# threads


@pytest.mark.parametrize(("threads", "words"), [(1, "on 1 thread;"), (2, "on 2 threads;")])
def test_the_threads_that_computed_are_printed_and_written(threads, words, cli, here, finished):
    torch.set_num_threads(threads)
    assert words in cli("train", "--model", "mlp", "--epochs", "1", "--cycles", "1", "--output", "run").out
    assert json.loads((here / "run" / "results.json").read_text())["threads"] == threads
    assert words in cli("evaluate", finished, "--output", "scores").out
    assert json.loads((here / "scores" / "results.json").read_text())["threads"] == threads
