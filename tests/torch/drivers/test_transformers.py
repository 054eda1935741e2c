"""The Trainer of transformers with the callback: right steps, right rates, and the same members after a kill."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from snapcore import CosineCycles, CycleWarning, ProtocolError, StoreError, program
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble, SnapshotLR
from snapcore_torch.transformers import SnapshotCallback

from .training import SIXTY, assert_members, examples, network, plain_loop, sgd, steps


class Classifier(nn.Module):
    """What the Trainer asks of a model: loss and logits by name. It keeps the rates of its updates."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.network, self.dropout = network(), nn.Dropout(dropout)

    def forward(self, x, labels=None):
        logits = self.dropout(self.network(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class Rates(TrainerCallback):
    """Keeps the rate of every update."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])


def arguments(folder, **options):
    fixed = {"per_device_train_batch_size": 6, "max_grad_norm": 0, "use_cpu": True, "report_to": []}
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    usual = {"max_steps": 60, "lr_scheduler_type": "constant", "learning_rate": 0.1}
    return TrainingArguments(str(folder / "out"), **{**fixed, **quiet, **usual, **options})


def trained(folder, *callbacks, plan=SIXTY, kind=InOrder, model=None, checkpoint=None, ours=None, opt=None, **options):
    model, rates = model or Classifier(), Rates()
    where = kind(
        model,
        arguments(folder, **options),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(*examples(), strict=True)],
        optimizers=opt(model) if opt else (sgd(model), None),
        callbacks=[rates, *callbacks, ours or SnapshotCallback(folder / "run", plan)],
    )
    where.train(resume_from_checkpoint=checkpoint)
    return where, rates.rates


def test_the_members_are_those_of_a_plain_loop_bit_for_bit(tmp_path):
    _, rates = trained(tmp_path)
    assert steps(tmp_path / "run") == [20, 40, 60]
    assert_members(tmp_path / "run", plain_loop(), "network.")
    assert rates == [SIXTY(step) for step in range(60)]


def test_with_our_scheduler_the_trainers_logs_have_the_rate(tmp_path):
    def opt(model):
        optimizer = sgd(model)
        return optimizer, SnapshotLR(optimizer, SIXTY)

    where, rates = trained(tmp_path, opt=opt, lr_scheduler_type="linear", logging_strategy="steps", logging_steps=1)
    assert_members(tmp_path / "run", plain_loop(), "network.")
    assert rates == [SIXTY(step) for step in range(60)]
    logged = [entry["learning_rate"] for entry in where.state.log_history if "learning_rate" in entry]
    assert len(logged) == 60
    assert set(logged) <= {SIXTY(step) for step in range(61)}


def test_the_trainers_own_optimizer_will_do(tmp_path):
    """Three lines: the schedule, the constant rate and the callback; weight decay makes two parameter groups."""
    where, rates = trained(tmp_path, opt=lambda model: (None, None), weight_decay=0.1)
    assert len(where.optimizer.param_groups) == 2
    assert steps(tmp_path / "run") == [20, 40, 60]
    assert rates == [SIXTY(step) for step in range(60)]


def test_an_ensemble_is_loaded_into_the_model_itself(tmp_path):
    where, _ = trained(tmp_path)
    ensemble = SnapshotEnsemble.load(tmp_path / "run", where.model, output=lambda outputs: outputs["logits"])
    x, _ = examples()
    probabilities = []
    for state in plain_loop():
        oracle = network()
        oracle.load_state_dict(state)
        probabilities.append(oracle.eval()(x).softmax(1))
    torch.testing.assert_close(ensemble(x), torch.stack(probabilities).mean(0))


@pytest.mark.parametrize("accumulate", [3, 4])
def test_updates_count_and_not_the_batches_that_they_accumulate(tmp_path, accumulate):
    """Users ask for cycles that are right under gradient accumulation; an epoch's last update has fewer batches."""
    plan = CosineCycles(0.1, 18, 3)
    _, rates = trained(tmp_path, plan=plan, max_steps=18, gradient_accumulation_steps=accumulate)
    assert steps(tmp_path / "run") == [6, 12, 18]
    assert rates == [plan(step) for step in range(18)]


def test_the_last_member_is_taken_when_training_ends_on_it_by_epochs(tmp_path):
    """Lightning's StochasticWeightAveraging never includes the last epoch."""
    trained(tmp_path, max_steps=-1, num_train_epochs=6)
    assert steps(tmp_path / "run") == [20, 40, 60]
    assert SnapshotStore(tmp_path / "run").stopped == "finished"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr_scheduler_type": "linear"}, r"LambdaLR \(linear\)"),
        ({"lr_scheduler_type": "cosine_with_restarts"}, r"LambdaLR \(cosine_with_restarts\)"),
        ({"opt": lambda model: (o := sgd(model), SnapshotLR(o, CosineCycles(0.1, 60, 2)))}, "SnapshotLR"),
        ({"opt": lambda model: (o := sgd(model), torch.optim.lr_scheduler.StepLR(o, 5))}, "StepLR"),
    ],
)
def test_a_second_schedule_is_refused_with_what_to_pass(tmp_path, options, named):
    """Transformers' own cosine_with_restarts captures nothing, and its default does not restart."""
    with pytest.raises(ProtocolError, match=rf"{named}.*lr_scheduler_type='constant'.*SnapshotLR\(optimizer, cycles\)"):
        trained(tmp_path, **options)
    assert not (tmp_path / "run").exists()


def test_a_trainer_that_trains_on_after_the_program_is_refused_at_the_start(tmp_path):
    with pytest.raises(ProtocolError, match=r"to do 61 updates, the program ends after 60: pass max_steps=60"):
        trained(tmp_path, max_steps=61)


def test_a_trainer_that_ends_before_the_program_is_warned_of(tmp_path):
    with pytest.warns(CycleWarning, match="ends after 50 of the program's 60 updates, and 1 of its members"):
        trained(tmp_path, max_steps=50)
    assert steps(tmp_path / "run") == [20, 40]


class KilledError(Exception):
    """Stands for a kill; the examples' tests send a real one."""


class KillAfter(TrainerCallback):
    """End training between two updates."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KilledError


def killed(folder, kill, *, every, **options):
    """Train, die after update `kill`, and return the last checkpoint."""
    callback = options.pop("ours", None) or SnapshotCallback(folder / "run", options.get("plan", SIXTY))
    with pytest.raises(KilledError):
        trained(folder, KillAfter(kill), ours=callback, save_strategy="steps", save_steps=every, **options)
    callback._close()  # the process lives on here, and with it the lock
    return str(folder / "out" / f"checkpoint-{kill // every * every}")


def same_members(one, other):
    for index in (1, 2, 3):
        theirs = SnapshotStore(other).load(index)
        mine = SnapshotStore(one).load(index)
        assert all(mine[name].tobytes() == array.tobytes() for name, array in theirs.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that was never stopped: shuffled, with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    trained(folder, kind=Trainer, model=Classifier(0.2))
    return folder / "run"


@pytest.mark.parametrize(("every", "kill"), [(7, 13), (33, 59), (20, 20), (17, 42)])
def test_a_killed_training_resumes_at_the_trainers_checkpoint_with_the_same_members(tmp_path, whole, every, kill):
    """In the middle of epochs: the Trainer restores the order of the data and the random states, and we the rest."""
    checkpoint = killed(tmp_path, kill, every=every, kind=Trainer, model=Classifier(0.2))
    _, rates = trained(tmp_path, kind=Trainer, model=Classifier(0.2), checkpoint=checkpoint)
    assert steps(tmp_path / "run") == [20, 40, 60]
    same_members(tmp_path / "run", whole)
    assert rates == [SIXTY(step) for step in range(kill // every * every, 60)]
    assert SnapshotStore(tmp_path / "run").stopped == "finished"


def test_it_survives_a_trainer_that_builds_its_callbacks_again(tmp_path):
    checkpoint = killed(tmp_path, 45, every=30, restore_callback_states_from_checkpoint=True)
    trained(tmp_path, checkpoint=checkpoint, restore_callback_states_from_checkpoint=True)
    assert_members(tmp_path / "run", plain_loop(), "network.")


@pytest.mark.parametrize("kill", [25, 50])
def test_restarts_survive_a_kill_too(tmp_path, kill):
    plan = program("star", lr=0.1, steps=60, cycles=3)
    (tmp_path / "whole").mkdir()
    trained(tmp_path / "whole", plan=plan)
    checkpoint = killed(tmp_path, kill, every=20, plan=plan)
    trained(tmp_path, plan=plan, checkpoint=checkpoint)
    same_members(tmp_path / "run", tmp_path / "whole" / "run")


def test_a_checkpoint_that_was_saved_without_the_callback_is_refused(tmp_path):
    trained(tmp_path, ours=Rates(), max_steps=10, save_strategy="steps", save_steps=10)
    with pytest.raises(ProtocolError, match="after step 10 of a checkpoint that was saved without this callback"):
        trained(tmp_path, checkpoint=str(tmp_path / "out" / "checkpoint-10"))


def test_training_again_in_a_directory_with_members_is_refused_unless_they_are_moved_aside(tmp_path):
    killed(tmp_path, 30, every=30)
    with pytest.raises(StoreError, match="starts at update 0: have it resume from its checkpoint"):
        trained(tmp_path)
    trained(tmp_path, ours=SnapshotCallback(tmp_path / "run", SIXTY, resume=False))
    assert (steps(tmp_path / "run"), steps(tmp_path / "run.1")) == ([20, 40, 60], [20])


@pytest.mark.parametrize("length", [60, 57])
def test_the_checkpoint_of_a_finished_training_is_finished(tmp_path, length):
    """At the end of an epoch and in the middle of one."""
    plan = CosineCycles(0.1, length, 3, remainder="even")
    trained(tmp_path, plan=plan, max_steps=length, save_strategy="steps", save_steps=length)
    before = (tmp_path / "run" / "snapcore.json").read_bytes()
    trained(tmp_path, plan=plan, max_steps=length, checkpoint=str(tmp_path / "out" / f"checkpoint-{length}"))
    assert (tmp_path / "run" / "snapcore.json").read_bytes() == before


def test_a_second_training_with_the_same_callback_frees_the_directory_of_the_first(tmp_path):
    callback = SnapshotCallback(tmp_path / "run", SIXTY, resume=False)
    with pytest.raises(KilledError):
        trained(tmp_path, KillAfter(30), ours=callback)
    trained(tmp_path, ours=callback)
    assert (steps(tmp_path / "run"), steps(tmp_path / "run.1")) == ([20, 40, 60], [20])


def test_a_model_that_would_be_sharded_is_refused(tmp_path):
    callback = SnapshotCallback(tmp_path / "run", SIXTY)
    given = arguments(tmp_path)
    given.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ProtocolError, match="shard the weights"):
        callback.on_train_begin(given, None, None, lr_scheduler=None)
