"""A run directory through anything that can happen to it, beside a dictionary of what it must hold."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snapcore.errors import StoreError
from snapcore.store import SnapshotStore, move_aside, new_member

INDEXES, SEEDS = st.integers(1, 5), st.integers(0, 2**32 - 1)
CALLS = ("os.open", "os.fsync", "os.replace", "snapcore.store.atomic.digest", "snapcore.store.directory.save_file")


def weights(seed):
    return {"w": np.random.default_rng(seed).normal(size=(2, 3)), "n": np.array(seed)}


def is_open(machine):
    return machine.store is not None


def is_closed(machine):
    return machine.store is None


class RunDirectory(RuleBasedStateMachine):
    """What readers find is what was added, whatever writers were about to do when they died."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "run"
        self.store, self.begun = None, False
        self.held, self.waiting, self.aside = {}, {}, []

    def teardown(self):
        if self.store is not None:
            self.store.close()
        shutil.rmtree(self.folder)

    @precondition(is_closed)
    @rule()
    def open(self):
        self.store, self.begun = SnapshotStore(self.path, "w"), True

    @precondition(is_open)
    @rule(left=st.booleans())
    def die(self, left):
        self.store.close()
        self.store, self.waiting = None, {}
        if left:
            (self.path / ".tmp-snapshot-001.safetensors-0123").write_bytes(b"half")

    @precondition(is_open)
    @rule(index=INDEXES, seed=SEEDS)
    def put(self, index, seed):
        write = lambda: self.store.put(  # noqa: E731
            weights(seed), new_member(index=index, step=10 * index, cycle=index - 1, lr=0.1, framework="numpy")
        )
        if index in self.held:
            with pytest.raises(StoreError, match="nothing is overwritten"):
                write()
        else:
            self.waiting[index] = write(), seed

    @precondition(lambda machine: machine.waiting)
    @rule(data=st.data())
    def add(self, data):
        index = data.draw(st.sampled_from(sorted(self.waiting)))
        member, seed = self.waiting.pop(index)
        self.store.add(member)
        self.held[index] = seed

    @precondition(is_open)
    @rule(index=INDEXES, seed=SEEDS, call=st.sampled_from(CALLS))
    def save_on_a_full_disk(self, index, seed, call):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with mock.patch(call, side_effect=full), pytest.raises(StoreError):
            self.store.save(weights(seed), index=index, step=1, cycle=0, lr=0.1, framework="numpy")

    @precondition(is_open)
    @rule()
    def refuse_a_second_writer(self):
        with pytest.raises(StoreError, match="is being written"):
            SnapshotStore(self.path, "w")
        with pytest.raises(StoreError, match="is being written"):
            move_aside(self.path)

    @precondition(lambda machine: is_closed(machine) and machine.begun)
    @rule()
    def move_aside(self):
        self.aside.append((move_aside(self.path), self.held))
        self.held, self.begun = {}, False

    @invariant()
    def readers_find_what_was_added(self):
        for path, held in [*self.aside, *([(self.path, self.held)] if self.begun else [])]:
            reader = SnapshotStore(path)
            assert [member.index for member in reader.members] == sorted(held)
            for index, seed in held.items():
                found, saved = reader.load(index), weights(seed)
                assert {name: array.tobytes() for name, array in found.items()} == {
                    name: array.tobytes() for name, array in saved.items()
                }

    @invariant()
    def nothing_is_begun_by_reading(self):
        if not self.begun:
            with pytest.raises(StoreError, match="holds no run"):
                SnapshotStore(self.path)
            assert not self.path.exists()

    @invariant()
    def a_writer_leaves_no_temporary_file(self):
        if self.store is not None:
            assert not list(self.path.glob(".tmp*"))


TestRunDirectory = RunDirectory.TestCase
TestRunDirectory.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
