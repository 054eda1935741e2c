"""One small training for every driver, and the same as a plain loop: what the members should hold, bit for bit."""

import copy

import torch
from torch import nn

from snapcore import CosineCycles
from snapcore.store import SnapshotStore

SIXTY = CosineCycles(lr=0.1, steps=60, cycles=3)
BATCHES = 10  # in an epoch


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def examples():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6 * BATCHES, 4, generator=draw)
    return x, (x @ torch.randn(4, 3, generator=draw)).argmax(1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain_loop(schedule=SIXTY, accumulate=1):
    """Every member of `schedule`, copied by hand from a loop without any driver."""
    model, members, step = network(), [], 0
    optimizer = sgd(model)
    batches = list(zip(*(part.split(6) for part in examples()), strict=True))
    while step < schedule.steps:
        for number, (x, y) in enumerate(batches, 1):
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if number % accumulate and number < len(batches):  # what is left over at an epoch's end is an update too
                continue
            optimizer.param_groups[0]["lr"] = schedule(step)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step in schedule.snapshot_steps:
                members.append(copy.deepcopy(model.state_dict()))
            if step == schedule.steps:
                break
    return members


def steps(directory):
    store = SnapshotStore(directory)
    store.verify()
    assert [member.due for member in store.members] == [member.step for member in store.members]
    return [member.step for member in store.members]


def assert_members(directory, expected, prefix=""):
    store = SnapshotStore(directory)
    assert len(store.members) == len(expected)
    for member, state in zip(store.members, expected, strict=True):
        found = store.load(member.index)
        assert found.keys() == {prefix + name for name in state}
        for name, tensor in state.items():
            assert found[prefix + name].tobytes() == tensor.numpy().tobytes(), (member.index, name)
