"""Lightning's own Trainer, with the callback: right steps, right rates, and the same members after a kill."""

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from snapcore import CosineCycles, CycleWarning, ProtocolError, StoreError, program
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble, SnapshotLR
from snapcore_torch.lightning import SnapshotCallback

from .training import SIXTY, assert_members, examples, network, plain_loop, sgd, steps

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Module(pl.LightningModule):
    """A network; `configure` gives what `configure_optimizers` returns, and `rates` are those of its updates."""

    def __init__(self, configure=None):
        super().__init__()
        self.network, self.rates = network(), []
        self.configure = configure or sgd

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        if optimizer.param_groups[0]["params"][0] is self.network[0].weight:
            self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        return self.configure(self)


def loader():
    return DataLoader(TensorDataset(*examples()), batch_size=6)


def trainer(*callbacks, max_steps=60, **options):
    options = {"max_epochs": -1, "logger": False, "enable_checkpointing": False, **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(max_steps=max_steps, callbacks=list(callbacks), **quiet, **options)


def fit(directory, *callbacks, module=None, plan=SIXTY, fit_options=None, **options):
    module = module or Module()
    where = trainer(*callbacks, SnapshotCallback(directory, plan), **options)
    where.fit(module, loader(), **(fit_options or {}))
    return module


def test_the_members_are_those_of_a_plain_loop_bit_for_bit(tmp_path):
    module = fit(tmp_path)
    assert steps(tmp_path) == [20, 40, 60]
    assert_members(tmp_path, plain_loop(), "network.")
    assert module.rates == [SIXTY(step) for step in range(60)]


def test_an_ensemble_is_loaded_into_the_module_itself(tmp_path):
    module = fit(tmp_path)
    x, _ = examples()
    ensemble = SnapshotEnsemble.load(tmp_path, module)
    probabilities = []
    for state in plain_loop():
        oracle = network()
        oracle.load_state_dict(state)
        probabilities.append(oracle.eval()(x).softmax(1))
    torch.testing.assert_close(ensemble(x), torch.stack(probabilities).mean(0))


def test_the_last_member_is_taken_when_training_ends_on_it_by_epochs(tmp_path):
    """Lightning's StochasticWeightAveraging never includes the last epoch."""
    fit(tmp_path, max_steps=-1, max_epochs=6)
    assert steps(tmp_path) == [20, 40, 60]
    assert SnapshotStore(tmp_path).stopped == "finished"


@pytest.mark.parametrize("accumulate", [3, 4])
def test_updates_count_and_not_the_batches_that_they_accumulate(tmp_path, accumulate):
    """Users ask for cycles that are right under gradient accumulation; an epoch's last update has fewer batches."""
    plan = CosineCycles(0.1, 18, 3)
    module = fit(tmp_path, plan=plan, max_steps=18, accumulate_grad_batches=accumulate)
    assert steps(tmp_path) == [6, 12, 18]
    assert_members(tmp_path, plain_loop(plan, accumulate), "network.")
    assert module.rates == [plan(step) for step in range(18)]


def test_a_trainer_without_an_end_ends_with_the_program(tmp_path):
    fit(tmp_path, max_steps=-1)
    assert steps(tmp_path) == [20, 40, 60]


def test_a_trainer_that_trains_on_after_the_program_is_refused_at_the_start(tmp_path):
    with pytest.raises(ProtocolError, match=r"to do 70 updates, the program ends after 60: pass max_steps=60"):
        fit(tmp_path / "run", max_steps=-1, max_epochs=7)
    assert not (tmp_path / "run").exists()


def test_a_trainer_that_ends_before_the_program_is_warned_of(tmp_path):
    with pytest.warns(CycleWarning, match="ends after 50 of the program's 60 updates, and 1 of its members"):
        fit(tmp_path, max_steps=50)
    assert steps(tmp_path) == [20, 40]


def with_scheduler(make, **config):
    def configure(module):
        optimizer = sgd(module)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **config}}

    return configure


@pytest.mark.parametrize(
    ("make", "config", "named"),
    [
        (lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2), {"interval": "step"}, "StepLR every 1 step"),
        (lambda optimizer: SnapshotLR(optimizer, SIXTY), {}, "SnapshotLR every 1 epoch"),
        (lambda optimizer: SnapshotLR(optimizer, SIXTY), {"interval": "step", "frequency": 2}, "every 2 step"),
        (lambda optimizer: SnapshotLR(optimizer, CosineCycles(0.1, 60, 2)), {"interval": "step"}, "SnapshotLR"),
    ],
)
def test_a_second_schedule_for_the_same_optimizer_is_refused(tmp_path, make, config, named):
    """Lightning's StochasticWeightAveraging replaces the user's schedule."""
    with pytest.raises(ProtocolError, match=rf"has a scheduler too, .*{named}.*return the optimizer alone"):
        fit(tmp_path / "run", module=Module(with_scheduler(make, **config)))
    assert not (tmp_path / "run").exists()


def test_our_own_scheduler_beside_the_callback_changes_nothing(tmp_path):
    module = Module(with_scheduler(lambda optimizer: SnapshotLR(optimizer, SIXTY), interval="step"))
    fit(tmp_path, module=module)
    assert_members(tmp_path, plain_loop(), "network.")


class TwoOptimizers(Module):
    """Manual optimization: the second optimizer takes two steps a batch, and has a scheduler."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(1, 1)

    def configure_optimizers(self):
        second = torch.optim.SGD(self.other.parameters(), lr=0.1)
        return [sgd(self.network), second], [torch.optim.lr_scheduler.StepLR(second, 5, gamma=0.5)]

    def training_step(self, batch):
        first, second = self.optimizers()
        for _ in range(2):
            second.zero_grad()
            self.other(torch.ones(1, 1)).square().sum().backward()
            second.step()
        first.zero_grad()
        nn.functional.cross_entropy(self(batch[0]), batch[1]).backward()
        first.step()
        self.lr_schedulers().step()


def test_the_chosen_optimizer_alone_counts_and_the_others_schedule_is_left_alone(tmp_path):
    """Lightning's StochasticWeightAveraging replaces the user's schedule."""
    module = TwoOptimizers()
    where = trainer(SnapshotCallback(tmp_path, SIXTY, optimizer=0), max_steps=-1)
    where.fit(module, loader())
    assert steps(tmp_path) == [20, 40, 60]
    last = SnapshotStore(tmp_path).load(3)
    expected = plain_loop()[2]
    assert all(last[f"network.{name}"].tobytes() == tensor.numpy().tobytes() for name, tensor in expected.items())
    assert module.rates == [SIXTY(step) for step in range(60)]
    assert where.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (60 // 5))


def test_several_optimizers_need_a_choice(tmp_path):
    with pytest.raises(ProtocolError, match=r"the module has 2: pass optimizer="):
        fit(tmp_path / "run", module=TwoOptimizers())
    with pytest.raises(ProtocolError, match=r"must be in 0\.\.1"):
        trainer(SnapshotCallback(tmp_path / "run", SIXTY, optimizer=2)).fit(TwoOptimizers(), loader())


def test_each_optimizers_callback_has_a_state_of_its_own():
    keys = {SnapshotCallback("run", SIXTY, optimizer=number).state_key for number in (None, 0, 1)}
    assert len(keys) == 3


class KilledError(Exception):
    """Stands for a kill; the examples' tests send a real one."""


class KillAfter(pl.Callback):
    """End training between two updates."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KilledError


def checkpoints(folder, every):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1, save_last=True)


@pytest.mark.parametrize(
    ("every", "kill"),
    [(10, 13), (30, 45), (20, 20), (20, 41), (10, 59)],
)
def test_a_killed_training_resumes_at_lightnings_checkpoint_with_the_same_members(tmp_path, every, kill):
    """Checkpoints lie at the ends of epochs; members taken after the last of them are taken again."""
    run, kept = tmp_path / "run", checkpoints(tmp_path / "kept", every)
    kept_at = kill // every * every
    with pytest.raises(KilledError):
        fit(run, kept, KillAfter(kill), enable_checkpointing=True)
    saved = tmp_path / "kept" / f"step={kept_at}.ckpt"
    module = fit(run, fit_options={"ckpt_path": saved, "weights_only": True})
    assert steps(run) == [20, 40, 60]
    assert_members(run, plain_loop(), "network.")
    assert module.rates == [SIXTY(step) for step in range(kept_at, 60)]
    assert SnapshotStore(run).stopped == "finished"


@pytest.mark.parametrize("kill", [25, 50])
def test_restarts_survive_a_kill_too(tmp_path, kill):
    plan = program("star", lr=0.1, steps=60, cycles=3)
    fit(tmp_path / "whole", plan=plan)
    with pytest.raises(KilledError):
        fit(tmp_path / "run", checkpoints(tmp_path / "kept", 20), KillAfter(kill), plan=plan, enable_checkpointing=True)
    fit(tmp_path / "run", plan=plan, fit_options={"ckpt_path": tmp_path / "kept" / f"step={kill // 20 * 20}.ckpt"})
    for index in (1, 2, 3):
        whole, run = (SnapshotStore(tmp_path / name).load(index) for name in ("whole", "run"))
        assert all(run[name].tobytes() == array.tobytes() for name, array in whole.items())


def test_fresh_restarts_take_their_weights_from_init(tmp_path):
    plan = program("singlecycle", lr=0.1, steps=20, cycles=2)
    callback = SnapshotCallback(tmp_path / "run", plan, init=lambda member: Module())
    trainer(callback, max_steps=20).fit(Module(), loader())
    first, second = (SnapshotStore(tmp_path / "run").load(index) for index in (1, 2))
    assert all(first[name].tobytes() == array.tobytes() for name, array in second.items())  # the same seed and data


class SaveInTheUpdate(pl.Callback):
    """Saves a checkpoint after an update that the callback behind it has not seen yet."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            if self.step < 60:
                raise KilledError


@pytest.mark.parametrize("step", [20, 30, 40])
def test_a_checkpoint_saved_before_the_callback_had_its_turn_is_right_too(tmp_path, step):
    with pytest.raises(KilledError):
        fit(tmp_path / "run", SaveInTheUpdate(tmp_path / "saved.ckpt", step))
    fit(tmp_path / "run", fit_options={"ckpt_path": tmp_path / "saved.ckpt"})
    assert_members(tmp_path / "run", plain_loop(), "network.")


class FailIn(Module):
    """Raises in the forward pass of one update."""

    def training_step(self, batch):
        if len(self.rates) == 30:
            raise KilledError
        return super().training_step(batch)


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")  # it looks for the checkpoint of an earlier error
def test_a_checkpoint_saved_because_of_an_error_can_be_resumed_from(tmp_path):
    with pytest.raises(KilledError):
        fit(tmp_path / "run", OnExceptionCheckpoint(tmp_path, "saved"), module=FailIn(), enable_checkpointing=True)
    fit(tmp_path / "run", fit_options={"ckpt_path": tmp_path / "saved.ckpt"})
    assert_members(tmp_path / "run", plain_loop(), "network.")


def test_a_checkpoint_that_was_saved_without_the_callback_is_refused(tmp_path):
    where = trainer(max_steps=10)
    where.fit(Module(), loader())
    where.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(ProtocolError, match="after step 10 of a checkpoint that was saved without this callback"):
        fit(tmp_path / "run", fit_options={"ckpt_path": tmp_path / "saved.ckpt"})


def test_training_again_in_a_directory_with_members_is_refused_unless_they_are_moved_aside(tmp_path):
    with pytest.raises(KilledError):
        fit(tmp_path / "run", KillAfter(30))
    with pytest.raises(StoreError, match="starts at update 0: have it resume from its checkpoint"):
        fit(tmp_path / "run")
    trainer(SnapshotCallback(tmp_path / "run", SIXTY, resume=False)).fit(Module(), loader())
    assert (steps(tmp_path / "run"), steps(tmp_path / "run.1")) == ([20, 40, 60], [20])


def test_the_checkpoint_of_a_finished_training_is_finished(tmp_path):
    fit(tmp_path / "run", checkpoints(tmp_path / "kept", 60), enable_checkpointing=True)
    fit(tmp_path / "run", fit_options={"ckpt_path": tmp_path / "kept" / "last.ckpt"})
    assert_members(tmp_path / "run", plain_loop(), "network.")


def test_a_second_fit_with_the_same_callback_starts_over(tmp_path):
    callback = SnapshotCallback(tmp_path / "run", SIXTY, resume=False)
    for _ in range(2):
        trainer(callback).fit(Module(), loader())
    assert (steps(tmp_path / "run"), steps(tmp_path / "run.1")) == ([20, 40, 60], [20, 40, 60])


def test_a_member_that_diverged_stops_training_and_frees_the_directory(tmp_path):
    class Diverging(Module):
        def on_train_batch_start(self, *_):
            if self.trainer.global_step == 15:
                with torch.no_grad():
                    self.network[0].weight.fill_(torch.nan)

    with pytest.raises(ArithmeticError, match=re.escape("member 1 at update 20")):
        fit(tmp_path, module=Diverging())
    with SnapshotStore(tmp_path, "w") as store:
        assert store.members == ()


def test_a_fast_dev_run_writes_nothing(tmp_path):
    where = trainer(SnapshotCallback(tmp_path / "run", SIXTY), fast_dev_run=True)
    where.fit(Module(), loader())
    assert not (tmp_path / "run").exists()


def test_a_strategy_that_shards_the_weights_is_refused(tmp_path):
    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(ProtocolError, match="FSDPStrategy shards the weights"):
        fit(tmp_path / "run", strategy=FSDPStrategy("cpu"))


def test_it_is_a_callback_that_lightning_can_give_its_logging_to(tmp_path):
    """Lightning puts `log` and `log_dict` on every callback; ours has none that could be overwritten."""
    callback = SnapshotCallback(tmp_path, SIXTY)
    assert isinstance(callback, pl.Callback)
    assert not {"log", "log_dict"} & set(dir(copy.copy(callback)))
