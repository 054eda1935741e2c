"""The batches after a resume are those of a run that was never stopped, whatever the loader draws its order from."""

import random
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from snapcore import CosineCycles, DataError
from snapcore.store import SnapshotStore
from snapcore_jax.loaders import Memory
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

CYCLES = CosineCycles(lr=0.1, steps=24, cycles=3)  # three epochs of eight batches
TX = optax.sgd(snapshot_schedule(CYCLES))
NUMBERS = np.arange(32, dtype=np.float32)


class Killed(Exception):  # noqa: N818  it is no error
    """Stands for the end of the process."""


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def train(directory, loader, *, kill=None, every=1, **options):
    """Return the batches in order; the loop draws beside the loader, as augmentation does."""
    params, state, seen = jnp.zeros(()), TX.init(jnp.zeros(())), []
    try:
        with SnapshotRun(directory, CYCLES, resume_every=every, **options) as run:
            params, state = run.start(params, state)
            for batch in run.batches(loader):
                seen.append([*np.asarray(batch).tolist(), np.random.random(), float(torch.rand(()))])
                updates, state = TX.update(params, state)
                params, state = run.step(params + updates, state)
                if run.updates == kill:
                    run._recorder.position()
                    raise Killed
    except Killed:
        pass
    return seen


class OwnGenerator:
    """Shuffles with a generator of its own, as most loaders in JAX programs do."""

    def __init__(self, make=lambda: np.random.default_rng(7)):
        self.rng = make()

    def __iter__(self):
        order = list(range(32))
        self.rng.shuffle(order)
        yield from NUMBERS[order].reshape(8, 4)


class CountsEpochs:
    def __init__(self):
        self.epoch, self.size = 0, 4

    def __iter__(self):
        order = np.random.default_rng(1000 + self.epoch).permutation(32)
        self.epoch += 1
        yield from NUMBERS[order].reshape(8, self.size)


class Wraps:
    """A prefetcher, say, around another loader."""

    def __init__(self, inner):
        self.inner = [inner]

    def __iter__(self):
        return iter(self.inner[0])


GLOBAL = np.random.default_rng(11)


class OfAGlobal:
    def __iter__(self):
        yield from NUMBERS[GLOBAL.permutation(32)].reshape(8, 4)


def of_a_global():
    GLOBAL.bit_generator.state = np.random.default_rng(11).bit_generator.state
    return OfAGlobal()


def over_and_over(rng):
    while True:
        yield from NUMBERS[rng.permutation(32)].reshape(8, 4)


def with_generator():
    return DataLoader(NUMBERS, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))


LOADERS = {
    "torch, from the global state": lambda: DataLoader(NUMBERS, batch_size=4, shuffle=True),
    "torch, from a generator": with_generator,
    "torch, from its sampler's": lambda: DataLoader(
        NUMBERS, batch_size=4, sampler=RandomSampler(NUMBERS, generator=torch.Generator().manual_seed(5))
    ),
    "numpy's generator": OwnGenerator,
    "philox": lambda: OwnGenerator(lambda: np.random.Generator(np.random.Philox(3))),
    "mersenne twister": lambda: OwnGenerator(lambda: np.random.Generator(np.random.MT19937(3))),
    "numpy's random state": lambda: OwnGenerator(lambda: np.random.RandomState(3)),
    "python's": lambda: OwnGenerator(lambda: random.Random(3)),
    "a count of its own": CountsEpochs,
    "wrapped": lambda: Wraps(Wraps(OwnGenerator())),
    "wrapped torch": lambda: Wraps(with_generator()),
    "a generator of the module": of_a_global,
    "a generator function": lambda: over_and_over(np.random.default_rng(3)),
}


@pytest.mark.exhaustive(keep=8)
@pytest.mark.parametrize("kill", [5, 8, 13])
@pytest.mark.parametrize("name", LOADERS)
def test_the_batches_after_a_kill_are_those_of_a_run_that_was_not_stopped(tmp_path, name, kill):
    seed(0)
    whole = train(tmp_path / "whole", LOADERS[name]())
    seed(0)
    before = train(tmp_path / "run", LOADERS[name](), kill=kill, every=4)
    seed(99)
    after = train(tmp_path / "run", LOADERS[name]())
    resumed_at = kill - kill % 4
    assert before == whole[:kill]
    assert after == whole[resumed_at:]
    assert len({str(whole[start : start + 8]) for start in (0, 8, 16)}) == 3


def test_a_loader_built_otherwise_than_before_is_refused_before_its_first_batch(tmp_path):
    train(tmp_path / "run", OwnGenerator(), kill=4)
    with pytest.raises(
        DataError, match=r"another than when the run was saved \(1 random generators then, 0 now\): build"
    ):
        train(tmp_path / "run", CountsEpochs())


class Stateful:
    """Knows where it is, and goes through its numbers once and for all, as an iterator of Grain does."""

    def __init__(self, as_bytes):
        self.index, self.as_bytes = 0, as_bytes
        self.passed = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.index += 1
        self.passed += 1
        return np.full(4, self.index % 7, np.float32)

    def get_state(self):
        return str(self.index).encode() if self.as_bytes else {"index": self.index}

    def set_state(self, state):
        self.index = int(state) if self.as_bytes else state["index"]


class StateDict(Stateful):
    get_state = set_state = None

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


@pytest.mark.parametrize("make", [lambda: Stateful(True), lambda: Stateful(False), lambda: StateDict(False)])
def test_a_loader_given_as_state_is_put_back_and_not_walked_through_again(tmp_path, make):
    seed(0)
    loader = make()
    whole = train(tmp_path / "whole", loader, state={"data": loader})
    seed(0)
    loader = make()
    train(tmp_path / "run", loader, kill=13, every=4, state={"data": loader})
    seed(99)
    loader = make()
    assert train(tmp_path / "run", loader, state={"data": loader}) == whole[12:]
    assert loader.index == 24


@pytest.mark.parametrize(
    ("given", "message"),
    [(object(), r"'data' in state= is object, without state_dict or get_state"), (torch.nn.Linear(1, 1), "plain JSON")],
)
def test_a_state_that_cannot_be_saved_is_refused_at_the_start(tmp_path, given, message):
    with SnapshotRun(tmp_path / "run", CYCLES, state={"data": given}) as run, pytest.raises(DataError, match=message):
        run.start(jnp.zeros(()), TX.init(jnp.zeros(())))


def test_another_state_than_was_saved_is_refused(tmp_path):
    loader = Stateful(False)
    train(tmp_path / "run", loader, kill=5, state={"data": loader})
    with pytest.raises(DataError, match=r"state= was \['data'\] when the run was saved, got \[\]"):
        train(tmp_path / "run", loader)


def test_what_surrounds_a_loader_is_looked_at_once_and_not_without_end():
    loop = Wraps(OwnGenerator())
    loop.inner.append(loop)
    memory = Memory(loop)
    assert len(memory.state()["generators"]) == 1


def test_where_torch_is_not_imported_nothing_of_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    loader = OwnGenerator()
    params, state = jnp.zeros(()), TX.init(jnp.zeros(()))
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        params, state = run.start(params, state)
        for _ in run.batches(loader):
            params, state = run.step(params, TX.update(params, state)[1])
    assert run.finished


def test_epochs_come_with_their_number_and_after_a_resume_with_the_batches_that_are_left(tmp_path):
    def epochs(directory, kill=None):
        params, state, seen, ended = jnp.zeros(()), TX.init(jnp.zeros(())), [], []
        try:
            with SnapshotRun(directory, CYCLES, resume_every=1) as run:
                params, state = run.start(params, state)
                for epoch, batches in run.epochs(OwnGenerator()):
                    for number, batch in enumerate(batches, batches.start):
                        assert number == run.updates % 8
                        seen.append((epoch, batch.tolist()))
                        updates, state = TX.update(params, state)
                        params, state = run.step(params + updates, state)
                        if run.updates == kill:
                            run._recorder.position()
                            raise Killed
                    ended.append(epoch)
        except Killed:
            pass
        return seen, ended

    whole, ended = epochs(tmp_path / "whole")
    assert ([epoch for epoch, _ in whole], ended) == ([0] * 8 + [1] * 8 + [2] * 8, [0, 1, 2])
    epochs(tmp_path / "run", kill=11)
    assert epochs(tmp_path / "run") == (whole[11:], [1, 2])
    epochs(tmp_path / "even", kill=16)
    assert epochs(tmp_path / "even") == (whole[16:], [1, 2])  # the end of epoch 1 was not reached before


def test_members_and_what_is_recorded_with_them_are_handed_over(tmp_path):
    taken = []
    params, state = jnp.zeros(()), TX.init(jnp.zeros(()))
    options = {"on_member": taken.append, "metrics": lambda snapshot: {"loss": snapshot.index / 10}}
    with SnapshotRun(tmp_path / "run", CYCLES, **options) as run:
        params, state = run.start(params, state)
        for _ in run.batches([0]):
            params, state = run.step(params, TX.update(params, state)[1])
    assert [(snapshot.index, snapshot.step) for snapshot in taken] == [(1, 8), (2, 16), (3, 24)]
    assert [member.metrics for member in SnapshotStore(tmp_path / "run").members] == [
        {"loss": 0.1},
        {"loss": 0.2},
        {"loss": 0.3},
    ]
