"""What PyTorch's adapter must keep on a GPU: copies beside training, random states, updates that no Python sees."""

import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import NotRun, Setting, Suite, check, check_equal_bits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from torch_common import DEVICE, GPU, about, bits, dense, resnet, synchronize

from snapcore import CosineCycles, StepDecay, program
from snapcore.data import TrainingData
from snapcore.run import execute
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble, SnapshotRun
from snapcore_torch.backend import TorchBackend
from snapcore_torch.graphs import KEPT

torch.use_deterministic_algorithms(True, warn_only=True)  # what has no such kernel shows in the bits that are compared

suite = Suite(about())

CYCLES = CosineCycles(lr=0.05, steps=48, cycles=3)
COMPILING: Any = {} if GPU else {"backend": "eager"}
Make = Callable[[Any], Optimizer]


def member_bits(directory: Path) -> list[dict[str, bytes]]:
    """Return every member's bytes, as they lie on disk."""
    store = SnapshotStore(directory)
    members = [store.load(member.index) for member in store.members]
    return [{name: array.tobytes() for name, array in tensors.items()} for tensors in members]


def check_members(found: Path, wanted: list[dict[str, bytes]]) -> None:
    """Compare the members on disk with states' bytes."""
    members = member_bits(found)
    check(len(members) == len(wanted), f"{len(members)} members, wanted {len(wanted)}")
    for number, (member, state) in enumerate(zip(members, wanted, strict=True), 1):
        check_equal_bits(member, state, f"member {number}")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(examples: int) -> Tensor:
    return torch.randint(10, (examples,), generator=torch.Generator().manual_seed(1))


def update(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    functional.cross_entropy(model(x).float(), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def copied_by_hand(schedule: Any, model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> list[Any]:
    """Train without a run, at the schedule's rates; at each trough wait until the weights have been copied."""
    copies = []
    for step in range(schedule.steps):
        optimizer.param_groups[0]["lr"] = schedule(step)
        update(model, optimizer, x, y)
        if step + 1 in schedule.snapshot_steps:
            copies.append(bits(model.state_dict()))
    return copies


@suite.test("members are the weights at their update, while training continues")
def training_continues(setting: Setting) -> None:
    width = setting.pick(full=2048, small=256, tiny=32)
    schedule = StepDecay(lr=0.05, steps=24, snapshots=8)
    x, y = noise(256, width).to(DEVICE), classes(256).to(DEVICE)

    def run(directory: Path) -> None:
        model = dense(width, 4)
        optimizer = sgd(model.parameters())
        with SnapshotRun(directory, schedule, model, optimizer) as run:
            while not run.finished:  # nothing here waits for the device
                update(model, optimizer, x, y)
                run.step()

    model = dense(width, 4)
    wanted = copied_by_hand(schedule, model, sgd(model.parameters()), x, y)
    run(setting.folder / "stream")
    check_members(setting.folder / "stream", wanted)
    if GPU:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            run(setting.folder / "side stream")
        check_members(setting.folder / "side stream", wanted)


def walk(directory: Path, make: Make, *, leave: int = 0, fail: int = 0) -> dict[str, bytes]:
    """Train a network with dropout on shuffled batches; leave the run after an update, or fail in the next."""
    model = dense(32, 2, dropout=0.5)
    optimizer = make(model.parameters())
    rate = optimizer.param_groups[0]["lr"]
    loader = DataLoader(TensorDataset(noise(64, 32), classes(64)), batch_size=16, shuffle=True)
    with SnapshotRun(directory, CYCLES, model, optimizer, resume_every=3) as run:
        kept = optimizer.param_groups[0]["lr"] is rate or not isinstance(rate, Tensor)
        check(kept, "a resume put another tensor in place of the rate that a captured graph reads")
        for x, y in run.batches(loader):
            update(model, optimizer, x.to(DEVICE), y.to(DEVICE))
            run.step()
            if run.updates == leave:
                break
            if run.updates == fail:
                raise InterruptedError
    random = torch.cuda.get_rng_state() if GPU else torch.get_rng_state()
    return bits({**model.state_dict(), "random state": random})


def resumes(folder: Path, make: Make) -> None:
    """Compare a run that was left, then failed, and each time resumed under another seed, with one that was not."""
    torch.manual_seed(0)
    whole = walk(folder / "whole", make)
    torch.manual_seed(0)
    walk(folder / "resumed", make, leave=7)
    torch.manual_seed(1)
    try:
        walk(folder / "resumed", make, fail=20)
    except InterruptedError:
        torch.manual_seed(2)
    resumed = walk(folder / "resumed", make)
    check_members(folder / "resumed", member_bits(folder / "whole"))
    check_equal_bits(resumed, whole, "the state at the end")


@suite.test("dropout and shuffled batches resume bit for bit")
def dropout_resumes(setting: Setting) -> None:
    resumes(setting.folder, sgd)


@suite.test("fused optimizers are counted, and resume bit for bit")
def fused_resume(setting: Setting) -> None:
    makes: dict[str, Make] = {
        "SGD": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, fused=True),
        "Adam": lambda parameters: Adam(parameters, lr=0.05, fused=True),
        "AdamW": lambda parameters: AdamW(parameters, lr=0.05, fused=True),
    }
    for name, make in makes.items():
        resumes(setting.folder / name, make)
        steps = [member.step for member in SnapshotStore(setting.folder / name / "resumed").members]
        check(steps == [*CYCLES.snapshot_steps], f"{name}: members at {steps}")


@suite.test("a capturable Adam resumes bit for bit, and keeps the tensor that its rate is in", needs_gpu=True)
def capturable_resumes(setting: Setting) -> None:
    rate = torch.tensor(0.05, device=DEVICE)
    resumes(setting.folder, lambda parameters: Adam(parameters, lr=rate.clone(), capturable=True))


def blobs(examples: int = 256, side: int = 8) -> TrainingData:
    """Return images of noise, each brighter or darker by its class."""
    y = classes(examples).numpy()
    x = noise(examples, 3, side, side).numpy() + (y[:, None, None, None] - 4.5) / 4
    return TrainingData(x.astype(np.float32), y, n_classes=10, batch_size=32)


def with_dropout(shape: tuple[int, ...], n_classes: int) -> nn.Module:
    images = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
    return nn.Sequential(images, nn.Flatten(), nn.Linear(8 * shape[1] * shape[2], n_classes))


@suite.test("the managed loop resumes bit for bit, in every precision", share=2)
def managed_resumes(setting: Setting) -> None:
    method = program("snapshot", lr=0.05, steps=120, cycles=3)

    def run(directory: Path, precision: str, *, fail: float = math.inf) -> None:
        def report(step: int, loss: float) -> None:
            if step == fail:
                raise InterruptedError

        execute(
            method,
            TorchBackend(),
            model=with_dropout,
            data=blobs(),
            directory=directory,
            report=report,
            resume_every=25,
            precision=precision,
        )

    for precision in ("float32", "bfloat16", "float16"):
        run(setting.folder / precision / "whole", precision)
        resumed = setting.folder / precision / "resumed"
        try:
            run(resumed, precision, fail=90)
        except InterruptedError:
            run(resumed, precision)
        check_members(resumed, member_bits(setting.folder / precision / "whole"))


@suite.test("the managed loop gives the weights of the same loop by hand")
def managed_by_hand(setting: Setting) -> None:
    data, updates, lr = blobs(), 40, 0.05
    begun = resnet(8, (1, 1), 10)
    backend = TorchBackend()
    state = backend.init(
        lambda *_: copy.deepcopy(begun), data, program("snapshot", lr=lr, steps=updates, cycles=2), seed=0
    )
    state = backend.train(state, 0, updates, report=lambda *_: None)
    model = copy.deepcopy(begun).to(DEVICE)
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for step, rows in enumerate(data.indices(0, updates)):
        optimizer.param_groups[0]["lr"] = lr / 2 * (math.cos(math.pi * (step % 20) / 20) + 1)
        update(model, optimizer, torch.from_numpy(data.x[rows]).to(DEVICE), torch.from_numpy(data.y[rows]).to(DEVICE))
    model.eval()
    with torch.no_grad():
        wanted = model(torch.from_numpy(data.x).to(DEVICE)).cpu().numpy()
    off = float(np.abs(backend.logits(state, data.x) - wanted).max() / np.abs(wanted).max())
    setting.found["largest difference"] = off
    check(off < 1e-4, f"logits differ by {off:.2g} of the largest")


@suite.test("at most two copies lie on the device, however many snapshots are taken", needs_gpu=True)
def memory_is_bounded(setting: Setting) -> None:
    x, y = noise(64, 2048).to(DEVICE), classes(64).to(DEVICE)

    def peak(snapshots: int) -> int:
        gc.collect()
        model = dense(2048, 4)
        optimizer = sgd(model.parameters())
        update(model, optimizer, x, y)
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        schedule = StepDecay(lr=0.05, steps=12, snapshots=snapshots or 1)
        run = SnapshotRun(setting.folder / str(snapshots), schedule, model, optimizer) if snapshots else None
        with run or nullcontext():
            for _ in range(12):
                update(model, optimizer, x, y)
                if run:
                    run.step()
        synchronize()
        return torch.cuda.max_memory_allocated()

    peak(0)  # cuBLAS takes its workspace
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = dense(2048, 4)
    copied = 2 * sum(tensor.nbytes for tensor in model.state_dict().values())  # with the moments, for the resume point
    del model
    plain, few, many = peak(0), peak(3), peak(12)
    gc.collect()
    setting.found |= {"copy": copied, "peak": {"no run": plain, "3 snapshots": few, "12 snapshots": many}}
    for snapshots, found in ((3, few), (12, many)):
        more = (found - plain) / copied
        check(more < 2.05, f"{snapshots} snapshots took {more:.2f} copies more than no run")
    check(
        torch.cuda.memory_allocated() <= before, f"{torch.cuda.memory_allocated() - before} bytes were not given back"
    )


@suite.test("a compiled bfloat16 model's members have its names and bits, and are loaded as such", share=2)
def compiled_bfloat16(setting: Setting) -> None:
    model = dense(64, 2, dropout=0.1).to(torch.bfloat16)
    compiled = torch.compile(model, **COMPILING)
    optimizer, wanted = sgd(model.parameters()), []
    x, y = noise(32, 64).to(DEVICE, torch.bfloat16), classes(32).to(DEVICE)
    with SnapshotRun(setting.folder / "run", CYCLES, compiled, optimizer) as run:
        while not run.finished:
            update(compiled, optimizer, x, y)
            if run.updates + 1 in CYCLES.snapshot_steps:
                wanted.append(bits(model.state_dict()))
            run.step()
    check_members(setting.folder / "run", wanted)
    model.eval()
    with torch.no_grad():
        found = SnapshotEnsemble.load(setting.folder / "run", model).members(x)[-1]
        check(torch.equal(found, model(x).float().softmax(-1)), "the last member gives other probabilities")


@suite.test("updates that a loss scaler skips are not counted")
def scaler_skips(setting: Setting) -> None:
    for fused in (False, True):
        model = dense(32, 2)
        optimizer = Adam(model.parameters(), lr=0.05, fused=fused)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40)
        x, y, real, skipped = noise(32, 32).to(DEVICE), classes(32).to(DEVICE), 0, 0
        directory = setting.folder / f"fused={fused}"
        with SnapshotRun(directory, CYCLES, model, optimizer, scaler=scaler) as run:
            while not run.finished:
                before = bits(model.state_dict())
                with torch.autocast(DEVICE.type, torch.float16):
                    loss = functional.cross_entropy(model(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                moved = bits(model.state_dict()) != before
                real, skipped = real + moved, skipped + (not moved)
                run.step()
                check(run.updates == real, f"fused={fused}: {run.updates} counted, the weights moved {real} times")
        check(skipped > 0, "nothing was skipped: the scale began too low to try it")
        setting.found[f"skipped, fused={fused}"] = skipped


class Graphed:
    """A training step captured in a CUDA graph, after the updates that warm it up."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.model = dense(64, 2)
        rate = torch.tensor(0.05, device=DEVICE)
        self.optimizer = Adam(self.model.parameters(), lr=rate, capturable=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                update(self.model, self.optimizer, x, y)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)

    def replay(self) -> None:
        self._graph.replay()


@suite.test("a replayed CUDA graph is counted by run.step(updates=n), and gets the schedule's rates", needs_gpu=True)
def cuda_graph(setting: Setting) -> None:
    x, y = noise(32, 64).to(DEVICE), classes(32).to(DEVICE)
    for at_once in (1, 2):
        graphed, wanted = Graphed(x, y), []
        eager = dense(64, 2)
        eager.load_state_dict(graphed.model.state_dict())
        optimizer = Adam(eager.parameters(), lr=0.05)
        optimizer.load_state_dict(copy.deepcopy(graphed.optimizer.state_dict()))
        directory = setting.folder / str(at_once)
        with SnapshotRun(directory, CYCLES, graphed.model, graphed.optimizer) as run:
            while not run.finished:
                rate = float(graphed.optimizer.param_groups[0]["lr"])
                check(math.isclose(rate, CYCLES(run.updates), rel_tol=1e-6), f"update {run.updates} is at rate {rate}")
                for _ in range(at_once):
                    graphed.replay()
                    optimizer.param_groups[0]["lr"] = torch.tensor(rate, device=DEVICE)
                    update(eager, optimizer, x, y)
                if run.updates + at_once in CYCLES.snapshot_steps:
                    wanted.append(bits(graphed.model.state_dict()))
                run.step(updates=at_once)
        check_members(directory, wanted)
        steps = [member.step for member in SnapshotStore(directory).members]
        check(steps == [*CYCLES.snapshot_steps], f"members at {steps}")
        off = largest_difference(graphed.model.state_dict(), eager.state_dict())
        setting.found[f"difference from the eager loop, {at_once} at once"] = off
        check(off < 1e-3, f"{at_once} at once: the weights differ from the eager loop's by {off:.2g}")


def largest_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the largest ‖a − b‖ / ‖b‖ of two states' tensors."""
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@suite.test("batches from pinned memory, brought over without waiting, give the same members", needs_gpu=True)
def pinned_batches(setting: Setting) -> None:
    def run(directory: Path, *, pinned: bool) -> None:
        torch.manual_seed(0)
        model = dense(512, 2, dropout=0.1)
        optimizer = sgd(model.parameters())
        data = TensorDataset(noise(256, 512), classes(256))
        loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=2, pin_memory=pinned)
        torch.manual_seed(0)
        with SnapshotRun(directory, CYCLES, model, optimizer) as run:
            for x, y in run.batches(loader):
                update(model, optimizer, x.to(DEVICE, non_blocking=pinned), y.to(DEVICE, non_blocking=pinned))
                run.step()

    run(setting.folder / "waited for", pinned=False)
    run(setting.folder / "not waited for", pinned=True)
    check_members(setting.folder / "not waited for", member_bits(setting.folder / "waited for"))


@suite.test("every strategy gives the mean that float64 gives on the host")
def strategies(setting: Setting) -> None:
    torch.manual_seed(0)
    models = [resnet(8, (1, 1), 10).eval() for _ in range(6)]
    x = noise(16, 3, 16, 16)
    with torch.no_grad():
        wanted = torch.stack([copy.deepcopy(model).double()(x.double()).softmax(-1) for model in models]).mean(0)
        for name, ensemble in ensembles(models):
            off = float((ensemble(x.to(DEVICE)).cpu() - wanted).abs().max())
            setting.found[f"largest difference, {name}"] = off
            check(off < 1e-4, f"{name}: probabilities differ by {off:.2g}")


def ensembles(models: list[nn.Module]) -> Iterator[tuple[str, SnapshotEnsemble]]:
    for strategy in ("loop", "stacked", *(["graph"] if GPU else [])):
        yield strategy, SnapshotEnsemble(copy.deepcopy(models), strategy=strategy).to(DEVICE)
    several = [DEVICE, "cpu"] if torch.cuda.device_count() < 2 else ["cuda:0", "cuda:1"]
    yield f"spread over {several[0]} and {several[1]}", SnapshotEnsemble(copy.deepcopy(models)).spread(several)
    tuned = SnapshotEnsemble(copy.deepcopy(models)).to(DEVICE)
    tuned.tune(noise(16, 3, 16, 16).to(DEVICE))
    yield "tuned", tuned


@suite.test("an ensemble's CUDA graphs, one for each shape, give what the loop gives for every batch", needs_gpu=True)
def ensemble_graphs(setting: Setting) -> None:
    torch.manual_seed(0)
    models = [resnet(8, (1, 1), 10).eval() for _ in range(6)]
    loop = SnapshotEnsemble(copy.deepcopy(models)).to(DEVICE)
    graph = SnapshotEnsemble(copy.deepcopy(models), strategy="graph").to(DEVICE)
    results = []
    for seed in range(12):  # of six shapes, which are more than are kept
        x = noise(1 + seed % 6, 3, 16, 16, seed=seed).to(DEVICE)
        for log in (False, True):
            with torch.inference_mode(seed % 2 == 0), torch.autocast("cuda", torch.bfloat16, enabled=seed % 3 == 0):
                results.append((graph(x, log=log), loop(x, log=log)))
    off = max(float((found - wanted).abs().max()) for found, wanted in results)
    setting.found["largest difference"] = off
    check(off < 1e-3, f"the graphs' results differ from the loop's by {off:.2g}")
    check(len(graph._graphs._kept) == KEPT, f"{len(graph._graphs._kept)} graphs are kept, wanted {KEPT}")
    graph.load_state_dict(loop.state_dict())
    graph.half(), loop.half()
    x = noise(2, 3, 16, 16).half().to(DEVICE)
    check(torch.allclose(graph(x), loop(x), atol=1e-3), "after half() the graphs are those of other weights")


@suite.test("the conformance suite holds on the device", needs_gpu=True, share=4)
def conformance(setting: Setting) -> None:
    try:
        import pytest
    except ModuleNotFoundError as error:
        raise NotRun("pytest is not installed") from error
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", "default", "tests/conformance/test_torch.py"])
    check(code == 0, f"pytest ended with {code!r}; its output is in the log")
