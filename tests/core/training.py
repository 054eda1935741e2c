"""Training in NumPy for the tests of runs: a backend, a loop of one's own, and the same without cursor or files."""

import copy
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from snapcore import CosineCycles, Restart, program
from snapcore.data import TrainingData
from snapcore.run import Recorder, execute
from snapcore.store import SnapshotStore

SIXTY = CosineCycles(0.2, 60, 3)  # members after 20, 40 and 60 updates
X = np.random.default_rng(0).normal(size=(12, 3))
DATA = TrainingData(X, np.zeros(12, int), n_classes=1, batch_size=4)
RESTARTS = [Restart(source, optimizer) for source in ("previous", "first", "fresh") for optimizer in ("keep", "reset")]


class Copied:
    """A pending capture: the copy is made here and now, and handed over later."""

    def __init__(self, tensors):
        self.tensors = copy.deepcopy(tensors)

    def resolve(self):
        return self.tensors


def weights_of(seed, member):
    return {"w": np.random.default_rng([seed, member]).normal(size=3), "updates": np.zeros((), np.int64)}


def noise_of(seed):
    return np.random.default_rng([seed, 0, 0])


def update(weights, moment, rate, batch, noise):
    """Momentum towards the batch's mean and some noise, in place: a capture that is no copy would change with it."""
    moment *= 0.9
    moment += weights["w"] - batch.mean(axis=0) + 0.01 * noise.normal(size=3)
    weights["w"] -= rate * moment
    weights["updates"] += 1


def dumped(weights, moment):
    return Copied({**{f"weights/{name}": array for name, array in weights.items()}, "moment": moment})


def loaded(tensors):
    weights = {name.removeprefix("weights/"): np.array(array) for name, array in tensors.items() if "/" in name}
    return weights, np.array(tensors["moment"])


# ------------------------------------------------------------------------------------------------ managed


@dataclass
class NumpyBackend:
    """The smallest backend: a quadratic, momentum, noise, and a log of what it was asked."""

    loss: object = staticmethod(lambda step: 1.0)
    spoil: int | None = None
    name: str = "numpy"
    log: list = field(default_factory=list)

    def init(self, model, data, program, *, seed, member=1, scale=1.0):
        self.log.append(("init", model, member))
        weights = weights_of(seed, member)
        weights["w"] *= scale
        return SimpleNamespace(weights=weights, moment=np.zeros(3), noise=noise_of(seed), data=data, program=program)

    def train(self, state, start, stop, *, report):
        self.log.append(("train", start, stop))
        for step, batch in enumerate(state.data.indices(start, stop), start):
            update(state.weights, state.moment, state.program.schedule(step), state.data.x[batch], state.noise)
            if step == self.spoil:
                state.weights["w"][1] = np.nan
            report(step + 1, self.loss(step + 1))
        return state

    def capture(self, state):
        return Copied(state.weights)

    def restore(self, state, tensors, *, optimizer):
        self.log.append(("restore", None if tensors is None else tensors["w"].tolist(), optimizer))
        if tensors is not None:
            state.weights = {name: np.array(value) for name, value in tensors.items()}
        if optimizer == "reset":
            state.moment = np.zeros(3)
        return state

    def dump(self, state):
        return dumped(state.weights, state.moment), {"noise": state.noise.bit_generator.state}

    def load(self, state, tensors, values):
        self.log.append(("load",))
        state.weights, state.moment = loaded(tensors)
        state.noise.bit_generator.state = values["noise"]
        return state


def managed(directory, plan=None, backend=None, **options):
    plan = plan or program("snapshot", lr=0.2, steps=60, cycles=3)
    return execute(plan, backend or NumpyBackend(), model="quadratic", data=DATA, directory=directory, **options)


def simulate(plan, seed):
    """The training of `managed` as one loop: no cursor, no program walked, no files."""
    training = SimpleNamespace(weights=weights_of(seed, 1), moment=np.zeros(3), noise=noise_of(seed))
    members = []
    for step in range(plan.updates):
        _restart(training, plan, members, step, seed)
        batch = X[DATA.indices(step, step + 1)[0]]
        update(training.weights, training.moment, plan.schedule(step), batch, training.noise)
        if step + 1 in plan.schedule.snapshot_steps:
            members.append(copy.deepcopy(training.weights))
    return members


def _restart(training, plan, members, step, seed):
    if members and step in plan.schedule.snapshot_steps:
        training.weights = {
            "previous": training.weights,
            "first": copy.deepcopy(members[0]),
            "fresh": weights_of(seed, len(members) + 1),
        }[plan.between.source]
        training.moment = np.zeros(3) if plan.between.optimizer == "reset" else training.moment


# ------------------------------------------------------------------------------------------------ pushed


class Shuffled:
    """A loader whose order and noise come from the random states of Python and NumPy, as augmentation does."""

    def __init__(self, batches=7):
        self.batches = batches

    def __iter__(self):
        order = list(range(self.batches))
        random.shuffle(order)
        for start in np.random.permutation(order):
            yield X[start : start + 4] + np.random.normal(scale=0.1) + random.gauss(0, 0.1)


class Training:
    """A loop's training. It draws from all random states, as dropout does, and from the framework's own."""

    def __init__(self, seed=0):
        self.seed, self.weights, self.moment, self.noise = seed, weights_of(seed, 1), np.zeros(3), noise_of(seed)

    def update(self, rate, batch):
        batch = batch + 0.01 * random.random() + 0.01 * np.random.normal()
        update(self.weights, self.moment, rate, batch, self.noise)

    def fresh(self, member):
        return weights_of(self.seed, member)

    def restore(self, tensors, *, optimizer):
        if tensors is not None:
            self.weights = {name: np.array(array) for name, array in tensors.items()}
        if optimizer == "reset":
            self.moment = np.zeros(3)

    def settings(self):
        return {"optimizer": "momentum"}

    def capture(self):
        return Copied(self.weights)

    def dump(self):
        return dumped(self.weights, self.moment), {}

    def load(self, tensors, values):
        self.weights, self.moment = loaded(tensors)

    def random_state(self):
        return self.noise.bit_generator.state

    def set_random_state(self, state):
        self.noise.bit_generator.state = state


def never(step):
    return False


def pushed(directory, plan, *, before=never, after=never, **options):
    """A program that is started anew: the same seeds every time, and it leaves where `before` or `after` say so."""
    random.seed(1)
    np.random.seed(1)
    training = Training()
    with Recorder(directory, plan, training, framework="numpy", **options) as recorder:
        recorder.start()
        for batch in recorder.batches(Shuffled()):
            if before(recorder.cursor.step):
                break
            training.update(recorder.cursor.lr, batch)
            recorder.record(1)
            if after(recorder.cursor.step):
                break


def undisturbed(plan):
    """The members of `pushed` from plain loops."""
    random.seed(1)
    np.random.seed(1)
    training, members, step = Training(), [], 0
    while step < plan.updates:
        for batch in Shuffled():
            training.update(plan.schedule(step), batch)
            step += 1
            if step in plan.schedule.snapshot_steps:
                members.append(copy.deepcopy(training.weights))
                _restart(training, plan, members, step, training.seed)
            if step == plan.updates:
                break
    return members


class Loop:
    """A user's loop: one weight that counts the updates, so that a member shows when it was copied."""

    fresh = None
    given = {}  # noqa: RUF012

    def settings(self):
        return self.given

    def __init__(self, directory, plan=SIXTY, *, resumable=True, framework="numpy", **options):
        self.weights, self.copies, self.resumable = {"updates": np.zeros((), np.int64)}, 0, resumable
        self.recorder = Recorder(directory, plan, self, framework=framework, **options)

    @property
    def updates(self):
        return int(self.weights["updates"])

    def step(self, n=1, **options):
        self.weights["updates"] += n
        return self.recorder.record(n, **options)

    def capture(self):
        self.copies += 1
        return Copied(self.weights)

    def dump(self):
        if not self.resumable:
            return None
        self.copies += 1
        return Copied({"weights/updates": self.weights["updates"]}), {"said": "by the loop"}

    def restore(self, tensors, *, optimizer):
        self.restored = tensors, optimizer

    def load(self, tensors, values):
        assert values == {"said": "by the loop"}
        self.weights = {"updates": np.array(tensors["weights/updates"])}

    def random_state(self):
        return None

    def set_random_state(self, state):
        assert state is None

    def __enter__(self):
        self.recorder.__enter__()
        return self

    def __exit__(self, *error):
        self.recorder.__exit__(*error)


# ------------------------------------------------------------------------------------------------ what is on disk


def members_of(directory):
    store = SnapshotStore(directory)
    store.verify()
    return [store.load(member.index) for member in store.members]


def counts(loop):
    """The step of each member, and the updates that its weights have seen."""
    loop.recorder.close()
    store = SnapshotStore(loop.recorder.directory)
    return [(member.step, int(store.load(member.index)["updates"])) for member in store.members]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {name: value.tolist() for name, value in one.items()} == {n: v.tolist() for n, v in other.items()}
