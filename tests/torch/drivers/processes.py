"""What two processes do under `torchrun`: `python -m torch.distributed.run --nproc-per-node 2 processes.py FOLDER`.

Every trainer in turn, with real gradients summed over gloo; each process leaves what it saw in `<name>-<rank>.json`.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import lightning.pytorch as pl
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from snapcore import CosineCycles
from snapcore_torch import SnapshotLR, SnapshotRun
from snapcore_torch.lightning import SnapshotCallback as LightningCallback
from snapcore_torch.transformers import SnapshotCallback as TransformersCallback

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
UPDATES = 12
CYCLES = CosineCycles(lr=0.1, steps=UPDATES, cycles=3)
TWICE = CosineCycles(lr=0.1, steps=2 * UPDATES, cycles=3)


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def data():
    torch.manual_seed(6)
    return TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def leave(name, model, **seen):
    seen["weights"] = {key: tensor.tolist() for key, tensor in model.state_dict().items()}
    (FOLDER / f"{name}-{RANK}.json").write_text(json.dumps(seen))


def accelerate():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = sgd(model)
    prepared = accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=3), SnapshotLR(optimizer, TWICE))
    wrapped, optimizer, loader, scheduler = prepared
    seen = {"updates": [], "last_epoch": [], "scheduled": [], "rates": [], "processes": accelerator.num_processes}
    with SnapshotRun(FOLDER / "accelerate", CYCLES, wrapped, optimizer) as run:
        for x, y in run.batches(loader):
            with accelerator.accumulate(wrapped):
                seen["rates"].append(optimizer.param_groups[0]["lr"])
                accelerator.backward(nn.functional.cross_entropy(wrapped(x), y))
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                seen["scheduled"].append(scheduler.get_last_lr()[0])
                run.step()
            seen["updates"].append(run.updates)
            seen["last_epoch"].append(scheduler.scheduler.last_epoch)
    leave("accelerate", model, **seen)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network, self.rates = network(), []

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        return sgd(self)


class InterruptedTrainingError(Exception):
    """Ends a training in all processes."""


class Interrupt(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 9:
            raise InterruptedTrainingError


def lightning():
    def fit(module, *callbacks, **options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_steps=UPDATES,
            max_epochs=-1,
            devices=2,
            accelerator="cpu",
            strategy="ddp",
            enable_model_summary=False,
            callbacks=[*callbacks, LightningCallback(FOLDER / "lightning", CYCLES)],
            **quiet,
        )
        trainer.fit(module, DataLoader(data(), batch_size=3), **options)
        return trainer

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(FOLDER / "lightning.ckpt")

    first = Module()
    with contextlib.suppress(InterruptedTrainingError):
        fit(first, Save(), Interrupt())
    second = Module()
    trainer = fit(second, ckpt_path=FOLDER / "lightning.ckpt")
    leave("lightning", second, rates=[*first.rates[:5], *second.rates], processes=trainer.world_size)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x, labels):
        logits = self.network(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rates(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])


def transformers():
    arguments = TrainingArguments(
        str(FOLDER / "out"),
        max_steps=UPDATES,
        per_device_train_batch_size=3,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    rates, callback = Rates(), TransformersCallback(FOLDER / "transformers", CYCLES)
    rows = [{"x": x, "labels": y} for x, y in data()]
    trainer = Trainer(Model(), arguments, train_dataset=rows, callbacks=[rates, callback])
    trainer.train()
    leave("transformers", trainer.model, rates=rates.rates, processes=arguments.world_size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerate()
    transformers()
    lightning()
