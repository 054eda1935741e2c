"""What `torchrun` starts for the tests: torchrun_script.py FOLDER SCENARIO … Each process leaves FOLDER/rank.json."""

import gc
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import snapcore_torch.run
from snapcore import CosineCycles, Program, SnapcoreError, program
from snapcore.data import LOSSES, TrainingData
from snapcore.run import execute
from snapcore_torch import SnapshotRun, TorchGroup
from snapcore_torch.backend import TorchBackend
from snapcore_torch.state import Copy

CYCLES = CosineCycles(0.1, 24, 3)
LONG = CosineCycles(0.1, 120, 2)
EXAMPLES, BATCH = 40, 8
rank = int(os.environ.get("RANK", "0"))
processes = int(os.environ.get("WORLD_SIZE", "1"))


def plain(input_shape=(1, 2, 3), n_classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, n_classes))


def noisy(input_shape=(1, 2, 3), n_classes=4):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, n_classes)
    )


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(EXAMPLES, 1, 2, 3)).astype(np.float32)
    return TrainingData(x, np.arange(EXAMPLES) % 4, 4, BATCH, seed=1)


def batches():
    """The same global batches, whatever the number of processes."""
    everything = TensorDataset(torch.tensor(data().x), torch.tensor(data().y))
    sampler = DistributedSampler(everything, processes, rank, shuffle=True, seed=3)
    return DataLoader(everything, BATCH // processes, sampler=sampler)


def begun(make, seed):
    """A model and its optimizer; random states differ in every process, and on resuming from those before."""
    torch.manual_seed(seed)
    model = make()
    if dist.is_initialized():
        model = DistributedDataParallel(model)
        torch.manual_seed(100 + rank + seed)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def train(directory, make=plain, schedule=CYCLES, seed=0, after=lambda run, model: None, **options):
    model, optimizer = begun(make, seed)
    with SnapshotRun(directory, schedule, model, optimizer, **options) as run:
        for x, y in run.batches(batches()):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            after(run, model)
    return model


def manage(directory, model, report=None, task=None, **options):
    plan = program("star", lr=0.1, steps=24, cycles=3)
    group = TorchGroup() if dist.is_initialized() else None
    device = {"device": "cpu"}
    return execute(
        plan,
        TorchBackend(),
        model=model,
        data=task or data(),
        directory=directory,
        seed=2,
        report=report,
        group=group,
        **device,
        **options,
    )


# ------------------------------------------------------------------------------------------------ scenarios


def alike(folder):
    """To compare with one process."""
    train(folder / "loop")
    losses = []
    manage(folder / "managed", plain, report=lambda step, loss: losses.append(loss))
    manage(folder / "accumulated", plain, accumulate=2, ema=0.5)
    return {"losses": losses, **{loss: of_kind(folder, loss) for loss in LOSSES}}


def of_kind(folder, loss):
    """Losses of a run of another kind; of the classes, more are ignored in one process than in the other."""
    values, losses = np.linspace(-1, 1, EXAMPLES), []
    classes = np.where(np.arange(EXAMPLES) % 5 < 3, -1, np.arange(EXAMPLES) % 4)
    targets = {
        "cross-entropy": (classes, 4),
        "binary-cross-entropy": (np.stack([values > 0, values < 0.5], -1), 2),
        "squared-error": (values, 1),
        "gaussian-nll": (np.stack([values, values**2], -1), 2),
    }
    ignore = -1 if loss == "cross-entropy" else None
    task = TrainingData(data().x, *targets[loss], BATCH, seed=1, loss=loss, ignore=ignore)
    manage(folder / loss, plain, task=task, report=lambda step, loss: losses.append(loss))
    manage(folder / f"{loss} accumulated", plain, task=task, accumulate=2)
    return losses


def whole(folder):
    """To compare with runs that were killed."""
    kept = []

    def keep(run, model):
        if run.updates in CYCLES.snapshot_steps:
            kept.append(model.module[2].running_mean.tolist())

    train(folder / "noisy", noisy, after=keep)
    train(folder / "long", noisy, LONG)
    manage(folder / "managed noisy", noisy, precision="bfloat16")
    return {"running_means": kept}


def copies(folder):
    """How many tensors each process copies."""
    counted = []

    class Counted(Copy):
        def __init__(self, tensors):
            counted.append(len(tensors))
            super().__init__(tensors)

    snapcore_torch.run.Copy = Counted
    train(folder / "copies")
    snapcore_torch.run.Copy = Copy
    return {"copied": sum(counted)}


def fresh(folder):
    """Fresh weights that no seed makes equal."""
    plan = program("singlecycle", lr=0.1, steps=24, cycles=3)
    model = train(folder / "fresh", schedule=plan, init=lambda member: plain())
    return {"weights": {name: tensor.tolist() for name, tensor in model.module.state_dict().items()}}


def refused(folder):
    """What each process raises."""
    raised = {}
    for name, attempt in {
        "finished": lambda: train(folder / "loop"),
        "managed": lambda: manage(folder / "managed", plain),
        "batch": lambda: execute(
            Program("test", CYCLES),
            TorchBackend(),
            model=plain,
            data=TrainingData(data().x, data().y, 4, 5),
            directory=folder / "odd",
            device="cpu",
            group=TorchGroup(),
        ),
        "sharded": lambda: sharded(folder),
        "zero": lambda: zero(folder),
    }.items():
        try:
            attempt()
        except SnapcoreError as error:
            raised[name] = f"{type(error).__name__}: {error}"
    raised["written"] = (folder / "sharded").exists()
    return raised


class Counter:
    """Something that differs in each process: a number, and a tensor."""

    def __init__(self):
        self.value, self.tensor = 0, torch.zeros(2)

    def state_dict(self):
        return {"value": self.value, "tensor": self.tensor}

    def load_state_dict(self, state):
        self.value, self.tensor = state["value"], state["tensor"]


def own_states(folder):
    """What each process gets back of `state=`, after leaving early; a head is the same in both."""
    results = {}
    for until in (9, 24):
        counter, head = Counter(), nn.Linear(2, 2)
        model, optimizer = begun(plain, seed=until)
        with SnapshotRun(folder / "own", CYCLES, model, optimizer, state={"counter": counter, "head": head}) as run:
            results[f"own at {until}"] = [run.updates, counter.value, counter.tensor.tolist()]
            for x, y in run.batches(batches()):
                counter.value, counter.tensor = 100 * rank + run.updates, torch.full((2,), 10.0 * rank)
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step()
                if run.updates == until:
                    break
    return results


def zero(folder):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, _ = begun(plain, seed=0)
    SnapshotRun(folder / "zero", CYCLES, model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1))


def sharded(folder):
    from torch.distributed.fsdp import fully_shard

    model = plain()
    fully_shard(model)
    SnapshotRun(folder / "sharded", CYCLES, model, torch.optim.SGD(model.parameters(), lr=0.1))


def gathered(folder):
    """Whether a gathering waits for all, and what it brings."""
    time.sleep(0.2 * rank)
    asked = time.time()
    values = TorchGroup().gather({"rank": rank, "asked": asked})
    return {"ranks": [value["rank"] for value in values], "waited": time.time() >= max(v["asked"] for v in values)}


def kill_loop(folder):
    def kill(run, model):
        if run.updates == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    train(folder / "killed", noisy, resume_every=5, after=kill)


def kill_managed(folder):
    def kill(step, loss):
        if step == 19:
            os.kill(os.getpid(), signal.SIGKILL)

    manage(folder / "killed managed", noisy, report=kill, resume_every=3, precision="bfloat16")


def terminate(folder):
    """The agent gets a signal, and passes it on to its processes."""

    def terminate_agent(run, model):
        if run.updates == 12:
            if rank == 1:
                os.kill(os.getppid(), signal.SIGTERM)
            while not run._recorder._sigterm.received:
                time.sleep(0.01)

    train(folder / "terminated", noisy, LONG, after=terminate_agent)


def resume(folder):
    done = []
    train(folder / "killed", noisy, seed=50, resume_every=5, after=lambda run, model: done.append(run.updates))
    return {"loop": done[0]}


def resume_managed(folder):
    done = []
    manage(
        folder / "killed managed",
        noisy,
        report=lambda step, loss: done.append(step),
        resume_every=3,
        precision="bfloat16",
    )
    return {"managed": done[0]}


def resume_terminated(folder):
    done = []
    train(folder / "terminated", noisy, LONG, seed=60, after=lambda run, model: done.append(run.updates))
    return {"terminated": done[0]}


def main(folder, *scenarios):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for scenario in scenarios:
        results |= globals()[scenario](Path(folder)) or {}
        Path(folder, f"{rank}.json").write_text(json.dumps(results))
    # A DistributedDataParallel in a cycle keeps the group, and so gloo's threads, until the interpreter has stopped: a
    # thread that then frees a tensor aborts the process (pytorch/pytorch#179291).
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
