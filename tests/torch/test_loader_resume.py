"""A loop over a data loader, stopped after any update and started again: bit for bit the run that was never stopped.

Every start is a new process as far as the run can tell: new objects, and random states that have nothing to do with
those before.
"""

import importlib
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler

from snapcore import CosineCycles, DataError
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotRun

# Python 3.12 says so of every fork beside the writer's thread.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

EXAMPLES, BATCH, UPDATES = 20, 4, 12  # 5 batches to the epoch
CYCLES = CosineCycles(lr=0.1, steps=UPDATES, cycles=3)


class Augmented(Dataset):
    """Examples with noise from each of the three libraries that data sets draw from."""

    def __init__(self, generator=None):
        self.x = torch.linspace(-1, 1, EXAMPLES * 3).reshape(EXAMPLES, 3)
        self.generator = generator

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        noise = torch.rand(3, generator=self.generator) + np.random.rand() + random.random()
        return self.x[index] + noise


class Itself:
    """A loader that keeps its position and draws its order itself, as stateful data loaders do."""

    def __init__(self):
        self.order, self.position, self.epoch = [], 0, -1

    def __iter__(self):
        torch.rand(3)  # whatever it needs to start
        return self.rest()

    def rest(self):
        if not self.order:
            self.epoch += 1
            self.order = np.random.default_rng(self.epoch).permutation(5).tolist()
        for index in self.order[self.position :]:
            self.position += 1
            yield torch.linspace(-1, 1, 60).reshape(5, 4, 3)[index] + torch.rand(1)
        self.order, self.position = [], 0

    def state_dict(self):
        return {"order": self.order, "position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.order, self.position, self.epoch = state["order"], state["position"], state["epoch"]


class ByEpoch(Sampler):
    """An order that is a function of the epoch, as a DistributedSampler's is."""

    def __init__(self):
        self.epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from np.random.default_rng(self.epoch).permutation(EXAMPLES).tolist()

    def __len__(self):
        return EXAMPLES


def generator():
    return torch.Generator().manual_seed(random.randrange(2**31))  # another one in every process


def batched_by_a_sampler_with_a_generator():
    return BatchSampler(RandomSampler(Augmented(), replacement=True, generator=generator()), BATCH, drop_last=False)


HERE = {
    "shuffled": lambda: DataLoader(Augmented(), BATCH, shuffle=True),
    "with a generator": lambda: DataLoader(Augmented(), BATCH, shuffle=True, generator=generator()),
    "sampler with a generator": lambda: DataLoader(
        Augmented(), BATCH, sampler=WeightedRandomSampler([1.0] * EXAMPLES, EXAMPLES, generator=generator())
    ),
    "batch sampler": lambda: DataLoader(Augmented(), batch_sampler=batched_by_a_sampler_with_a_generator()),
    "data set with a generator": lambda: DataLoader(Augmented(generator()), BATCH, shuffle=True),
    "set_epoch": lambda: DataLoader(Augmented(), BATCH, sampler=ByEpoch()),
    "list": lambda: list(torch.linspace(-1, 1, 60).reshape(5, 4, 3)),
    "keeps its position": Itself,
}
WORKERS = {
    "forked": {},
    "forked, with a generator": {"generator": True},
    "forked, persistent": {"persistent_workers": True},
    "forked, persistent, with a generator": {"persistent_workers": True, "generator": True},
    "forked, one ahead": {"prefetch_factor": 1},
}


def with_workers(dataset=None, **options):
    if options.pop("generator", False):
        options["generator"] = generator()
    options = {"multiprocessing_context": "fork", "num_workers": 2, **options}
    return DataLoader(dataset or Augmented(), BATCH, shuffle=True, **options)


def scrambled():
    """Leave no random state as another process left it."""
    random.seed()
    np.random.seed(random.randrange(2**31))
    torch.manual_seed(random.randrange(2**31))


def seed_all(loader):
    for draw in (random.seed, np.random.seed, torch.manual_seed):
        draw(5)
    batch_sampler = getattr(loader, "batch_sampler", None)
    for holder in (loader, getattr(loader, "dataset", None), getattr(batch_sampler, "sampler", None)):
        if getattr(holder, "generator", None) is not None:
            holder.generator.manual_seed(5)


def start(directory, make_loader, *, stop_at=None, how="leaving", first=False, accumulate=1):
    """A process: build all, train, and be stopped after an update, if so asked. Return the updates done in it."""
    scrambled()
    loader = make_loader()
    if first:
        seed_all(loader)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    state = {"loader": loader} if isinstance(loader, Itself) else None
    with SnapshotRun(directory, CYCLES, model, optimizer, state=state) as run:
        begun = run.updates
        for micro_batch, x in enumerate(run.batches(loader), 1):
            model(x).square().mean().backward()
            if micro_batch % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            if how == "SIGTERM" and run.updates + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            run.step()
            if run.updates == stop_at:
                if how == "an exception":
                    raise KeyError("in the loop")
                break
    return run.updates - begun


def stopped(directory, make_loader, stop_at, how, **options):
    endings = {"leaving": (), "an exception": KeyError, "SIGTERM": SystemExit}
    try:
        start(directory, make_loader, stop_at=stop_at, how=how, **options)
    except endings[how]:
        return
    assert how == "leaving"


def members(directory):
    store = SnapshotStore(directory)
    assert store.stopped == "finished"
    return [{name: array.tobytes() for name, array in store.load(index).items()} for index in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _sigterm():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def check(directory, make_loader, stops, how="leaving", **options):
    start(directory / "whole", make_loader, first=True, **options)
    for number, stop_at in enumerate(stops):
        stopped(directory / "parts", make_loader, stop_at, how, first=number == 0, **options)
    done = start(directory / "parts", make_loader, **options)
    assert done == UPDATES - (stops[-1] // 4 * 4 if how == "an exception" else stops[-1])
    assert members(directory / "parts") == members(directory / "whole")


@pytest.mark.exhaustive(keep=8)
@pytest.mark.parametrize("loader", HERE)
@pytest.mark.parametrize(
    "stops", [[5], [9], list(range(1, UPDATES))], ids=["with an epoch", "within one", "ever so often"]
)
def test_stopped_after_an_update_and_started_again(tmp_path, loader, stops):
    check(tmp_path, HERE[loader], stops)


@pytest.mark.exhaustive(keep=5)
@pytest.mark.parametrize("loader", HERE)
@pytest.mark.parametrize("how", ["an exception", "SIGTERM"])
def test_stopped_by_something_else(tmp_path, loader, how):
    """After an exception it resumes from the last cycle's end."""
    check(tmp_path, HERE[loader], [7, 10], how)


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("workers", WORKERS)
def test_stopped_with_workers_that_draw_random_numbers(tmp_path, workers):
    check(tmp_path, lambda: with_workers(**WORKERS[workers]), [5, 8])


@pytest.mark.parametrize("how", ["an exception", "SIGTERM"])
def test_stopped_with_workers_by_something_else(tmp_path, how):
    check(tmp_path, lambda: with_workers(persistent_workers=True), [7], how)


@pytest.mark.exhaustive
def test_stopped_with_a_worker_that_was_spawned(tmp_path, monkeypatch):
    """It imports the data set, which must be in a module that it finds."""
    (tmp_path / "spawned_dataset.py").write_text(
        "import random, numpy, torch\n"
        "class Augmented(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 48\n"
        "    def __getitem__(self, index): return torch.rand(3) + numpy.random.rand() + random.random() + index\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    dataset = importlib.import_module("spawned_dataset").Augmented()
    check(tmp_path, lambda: with_workers(dataset, num_workers=1, multiprocessing_context="spawn"), [7])


def test_accumulated_batches_are_skipped_too(tmp_path):
    check(tmp_path, HERE["shuffled"], [2, 5], accumulate=2)


def test_persistent_workers_that_are_there_already_are_left_to_their_owner(tmp_path):
    """The run starts others, every epoch."""
    loader = with_workers(persistent_workers=True)
    list(loader)
    theirs = loader._iterator
    start(tmp_path, lambda: loader, stop_at=6)
    assert loader._iterator is theirs
    assert len(list(loader)) == 5


def test_a_loader_with_fewer_generators_than_before_is_refused(tmp_path):
    start(tmp_path, HERE["with a generator"], stop_at=3)
    with pytest.raises(DataError, match="had 1 generators when the epoch started, got 0: build the loader as it was"):
        start(tmp_path, HERE["shuffled"])


@pytest.mark.parametrize("stops", [[5], [3], [9, 10]], ids=["with an epoch", "within one", "both"])
def test_epochs_are_counted_on_and_what_follows_each_is_done_once_more_at_most(tmp_path, stops):
    """Evaluation after every epoch, which draws random numbers, though the run was stopped before it."""

    def train(directory, stop_at=None, *, first=False):
        scrambled()
        loader = HERE["shuffled"]()
        if first:
            seed_all(loader)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        with SnapshotRun(directory, CYCLES, model, optimizer) as run:
            for epoch, batches in run.epochs(loader):
                for x in batches:
                    optimizer.zero_grad()
                    model(x).square().mean().backward()
                    optimizer.step()
                    run.step()
                    if run.updates == stop_at:
                        return
                evaluated.append((epoch, run.updates, torch.rand(1).item()))

    evaluated = []
    train(tmp_path / "whole", first=True)
    whole, evaluated = evaluated, []
    for number, stop_at in enumerate([*stops, None]):
        train(tmp_path / "parts", stop_at, first=number == 0)
    assert [each[:2] for each in whole] == [(0, 5), (1, 10), (2, 12)]
    assert evaluated == whole
    assert members(tmp_path / "parts") == members(tmp_path / "whole")


@pytest.mark.parametrize("stop_at", [2, 3, 5, 8])
def test_gradients_accumulated_by_the_number_of_a_batch_make_the_same_updates_after_a_resume(tmp_path, stop_at):
    """Two micro-batches an update, and the last of five alone, as loops write it with the length of the loader."""

    def train(directory, stop_at=None, *, first=False):
        scrambled()
        loader = HERE["shuffled"]()
        if first:
            seed_all(loader)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with SnapshotRun(directory, CYCLES, model, optimizer) as run:
            for _, batches in run.epochs(loader):
                for number, x in enumerate(batches, batches.start):
                    model(x).square().mean().backward()
                    if (number + 1) % 2 == 0 or number + 1 == len(loader):
                        optimizer.step()
                        optimizer.zero_grad()
                    run.step()
                    if run.updates == stop_at:
                        return

    train(tmp_path / "whole", first=True)
    train(tmp_path / "parts", stop_at, first=True)
    train(tmp_path / "parts")
    assert members(tmp_path / "parts") == members(tmp_path / "whole")


def test_the_plain_form_resumes_at_the_epoch_after_the_last_one(tmp_path):
    """`range(run.updates // len(loader), E)`, with an order that is a function of the epoch."""

    def train(directory, epochs):
        torch.manual_seed(7)
        model, loader = nn.Linear(3, 2), HERE["set_epoch"]()
        loader.dataset.__class__ = Plain
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with SnapshotRun(directory, CosineCycles(0.1, 15, 3), model, optimizer) as run:
            for epoch in range(run.updates // len(loader), epochs):
                loader.sampler.set_epoch(epoch)
                for x in loader:
                    optimizer.zero_grad()
                    model(x).square().mean().backward()
                    optimizer.step()
                    run.step()

    train(tmp_path / "whole", 3)
    train(tmp_path / "parts", 2)
    train(tmp_path / "parts", 3)
    assert members(tmp_path / "parts") == members(tmp_path / "whole")


class Plain(Augmented):
    def __getitem__(self, index):
        return self.x[index]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_micro_batches_left_over_at_an_epochs_end_are_given_again(tmp_path, stop_at):
    """Five batches to the epoch and three to the update: gradients reach into the next epoch."""
    check(tmp_path, HERE["shuffled"], [stop_at], accumulate=3)


class Noted:
    """Whatever a loader is made of: it notes the epoch that it is given, and shuffles by it."""

    def __init__(self):
        self.epoch, self.heard = 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.heard.append(epoch)

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(EXAMPLES).reshape(5, BATCH)
        return iter(order.tolist())


class Wrapped:
    """A loader around another, as libraries have them."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_batch_sampler_is_given_the_epoch_however_deep_its_loader_is_wrapped(tmp_path, depth):
    def make():
        loader = DataLoader(Augmented(), batch_sampler=Noted())
        for _ in range(depth):
            loader = Wrapped(loader)
        return loader

    check(tmp_path, make, [3, 7])


@pytest.mark.parametrize("depth", [1, 2])
def test_a_generator_is_found_however_deep_its_loader_is_wrapped(tmp_path, depth):
    shared = []

    def make():
        loader = DataLoader(Augmented(), BATCH, shuffle=True, generator=generator())
        shared.append(loader.generator)
        if len(shared) in (1, 2):  # the whole run's and the first part's
            loader.generator.manual_seed(5)
        for _ in range(depth):
            loader = Wrapped(loader)
        return loader

    check(tmp_path, make, [3, 7])


@pytest.mark.parametrize("cure", ["generator=", "new workers"])
def test_a_kept_loader_that_evaluates_is_told_of_and_what_the_warning_says_makes_the_run_exact(tmp_path, cure):
    """Kept workers draw their seed on the first walk alone: in a resumed process, where the whole run drew none."""

    def train(directory, options, stop_at=None, *, first=False):
        scrambled()
        loader = HERE["shuffled"]()
        if first:
            seed_all(loader)
        evaluating = DataLoader(Augmented(), BATCH, num_workers=1, multiprocessing_context="fork", **options)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with SnapshotRun(directory, CYCLES, model, optimizer) as run:
            for _, batches in run.epochs(loader):
                for x in batches:
                    optimizer.zero_grad()
                    model(x).square().mean().backward()
                    optimizer.step()
                    run.step()
                    if run.updates == stop_at:
                        return
                list(evaluating)

    with pytest.warns(UserWarning, match=r"Give it generator=torch.Generator\(\), or leave that out"):
        train(tmp_path / "told", {"persistent_workers": True}, 1)
    options = {"persistent_workers": True, "generator": torch.Generator()} if cure == "generator=" else {}
    train(tmp_path / "whole", options, first=True)
    train(tmp_path / "parts", options, 7, first=True)
    train(tmp_path / "parts", options)
    assert members(tmp_path / "parts") == members(tmp_path / "whole")
