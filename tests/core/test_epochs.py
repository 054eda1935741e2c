"""The position in a loader: every epoch whole, and after a resume the batches that would have come."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import CosineCycles, Cursor, ProtocolError
from snapcore.run.batches import Epochs
from snapcore.run.random_state import random_state, set_random_state

from .training import Loop, counts


class Loader(list):
    """A list that counts what is taken out of it."""

    taken = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.taken += 1
            yield batch


@pytest.fixture
def loop(tmp_path):
    with Loop(tmp_path / "run") as loop:
        yield loop


def test_batches_come_epoch_after_epoch_until_the_program_stops(loop):
    loader, seen = Loader(range(7)), []
    for batch in loop.recorder.batches(loader):
        seen.append(batch)
        loop.step()
    assert seen == [update % 7 for update in range(60)]
    assert loader.taken == 60  # none is asked for in vain
    assert counts(loop) == [(20, 20), (40, 40), (60, 60)]


def test_batches_end_where_the_program_and_an_epoch_end_together(loop):
    loader = Loader(range(20))
    for _ in loop.recorder.batches(loader):
        loop.step()
    assert loader.taken == 60


def test_several_micro_batches_may_make_an_update(loop):
    for position, _ in enumerate(loop.recorder.batches(range(10)), 1):
        if position % 4 == 0:
            loop.step()
    assert position == 240


def test_after_finish_there_are_no_more_batches(loop):
    seen = 0
    for _ in loop.recorder.batches(range(7)):
        seen += 1
        loop.step()
        if seen == 25:
            loop.recorder.finish("enough")
    assert seen == 25
    assert list(loop.recorder.batches(range(7))) == []


def test_a_loader_without_batches_is_refused(loop):
    with pytest.raises(ProtocolError, match="the loader gave no batch"):
        next(loop.recorder.batches([]))


def test_a_loader_that_can_be_walked_only_once_is_refused_in_the_second_epoch(loop):
    batches = loop.recorder.batches(iter(range(5)))
    for expected in range(5):
        assert next(batches) == expected
        loop.step()
    with pytest.raises(ProtocolError, match="can be walked again every epoch"):
        next(batches)


def test_an_epoch_without_an_update_is_refused(loop):
    with pytest.raises(ProtocolError, match=r"no update in 7 batches: call run\.step\(\)"):
        for _ in loop.recorder.batches(range(7)):
            pass


def test_a_sampler_that_shuffles_by_epoch_is_given_each_epoch(loop):
    called = []
    loader = Loader(range(25))
    loader.sampler = SimpleNamespace(set_epoch=called.append)
    for _ in loop.recorder.batches(loader):
        loop.step()
    assert called == [0, 1, 2]


def test_a_sampler_that_does_not_is_left_alone(loop):
    loader = Loader(range(30))
    loader.sampler = SimpleNamespace()
    assert sum(1 for _ in loop.recorder.batches(loader) if loop.step() or True) == 60


# -------------------------------------------------------------------------------------------- the position


class Python:
    """Draws its order from Python's random numbers, when an epoch is begun."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return iter(random.sample(range(self.size), self.size))


class NumPy(Python):
    """Draws it from NumPy's, when the first batch is asked for."""

    def __iter__(self):
        yield from np.random.permutation(self.size).tolist()


class Augmented(Python):
    """Draws for every batch as well."""

    def __iter__(self):
        for batch in np.random.permutation(random.sample(range(self.size), self.size)):
            yield int(batch), random.random(), float(np.random.normal())


class Sampled(Python):
    """Draws nothing: its order is a function of the epoch that its sampler is given."""

    def __init__(self, size):
        super().__init__(size)
        self.sampler, self.epoch = self, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(random.Random(self.epoch).sample(range(self.size), self.size))


LOADERS = st.sampled_from([Python, NumPy, Augmented, Sampled])


class Process:
    """One that walks a loader: `micro` batches make an update, and every batch draws `draws` times in training."""

    def __init__(self, loader, *, updates, micro=1, draws=0, seed=1):
        random.seed(seed)
        np.random.seed(seed)
        self.loader, self.micro, self.draws, self.seen = loader, micro, draws, []
        self.cursor = Cursor(CosineCycles(0.1, updates, 1))
        self.epochs = Epochs(self.cursor, random_state, set_random_state)

    def walk(self, *, until=None, in_hand=0):
        """Leave after `until` updates, with some batches in hand of which no update was made."""
        used, hand = [], []
        for batch in self.epochs.walk(self.loader):
            hand.append(batch)
            if self.cursor.step != until:
                self._train()
                if len(hand) == self.micro:
                    used += hand
                    hand.clear()
                    self.cursor.advance()
                    self.epochs.settle()
            if (self.cursor.step, len(hand)) == (until, in_hand):
                break
        return used

    def _train(self):
        for _ in range(self.draws):
            random.random()
            np.random.normal()

    def position(self):
        return json.loads(json.dumps([self.cursor.state_dict(), self.epochs.state_dict(), random_state()]))

    def resume(self, position):
        self.cursor.load_state_dict(position[0])
        self.epochs.load_state_dict(position[1])
        set_random_state(position[2])
        return self


@given(LOADERS, st.integers(1, 5), st.integers(2, 12), st.integers(0, 2), st.data())
def test_the_batches_after_any_update_are_those_of_a_walk_never_left(kind, size, updates, draws, data):
    micro = data.draw(st.integers(1, size))

    def process(seed=1):
        return Process(kind(size), updates=updates, micro=micro, draws=draws, seed=seed)

    expected = process().walk()
    after = random_state()
    until = data.draw(st.integers(1, updates - 1))
    one = process()
    seen = one.walk(until=until)
    position = one.position()
    assert seen + process(seed=99).resume(position).walk() == expected
    assert random_state() == after  # the numbers that come later are the same, too


@given(LOADERS.filter(lambda kind: kind is not Augmented), st.integers(1, 5), st.integers(2, 12), st.data())
def test_a_batch_that_was_taken_and_left_is_given_again(kind, size, updates, data):
    """`for batch in run.batches(loader): if time_is_up(): break` comes before the update."""
    expected = Process(kind(size), updates=updates).walk()
    until = data.draw(st.integers(0, updates - 1))
    one = Process(kind(size), updates=updates)
    seen = one.walk(until=until, in_hand=data.draw(st.integers(1, size - until % size)))
    position = one.position()
    assert seen + Process(kind(size), updates=updates, seed=99).resume(position).walk() == expected


@given(LOADERS, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2))
def test_the_first_batches_of_an_epoch_are_given_again_with_all_that_they_draw(kind, size, micro, draws):
    def process(seed=1):
        return Process(kind(size * micro), updates=3 * size, micro=micro, draws=draws, seed=seed)

    expected = process().walk()
    one = process()
    seen = one.walk(until=size, in_hand=1)
    assert one.epochs.state_dict()["epoch"] == 1
    assert seen + process(seed=99).resume(one.position()).walk() == expected


def test_micro_batches_since_the_last_update_are_given_again():
    one = Process(range(10), updates=6, micro=4)
    assert one.walk(until=1, in_hand=3) == [0, 1, 2, 3]
    assert one.epochs.state_dict()["batches"] == 4
    assert Process(range(10), updates=6, micro=4).resume(one.position()).walk()[:4] == [4, 5, 6, 7]


def test_the_rest_of_an_epoch_may_be_too_short_for_an_update():
    one = Process(range(3), updates=3, micro=2)
    assert one.walk(until=1) == [0, 1]
    assert Process(range(3), updates=3, micro=2).resume(one.position()).walk() == [2, 0, 1, 2]


def test_a_first_batch_that_is_only_looked_at_comes_again_in_the_walk():
    process = Process(Augmented(5), updates=9)
    looked_at = next(process.epochs.walk(process.loader))
    assert process.walk()[0] == looked_at


def test_a_position_between_two_walks_of_the_same_process_is_kept():
    process = Process(Augmented(5), updates=9)
    seen = [batch for until in (2, 5, 7, None) for batch in process.walk(until=until)]
    assert seen == Process(Augmented(5), updates=9).walk()


def test_a_sampler_is_given_the_epoch_that_is_resumed():
    one = Process(Sampled(5), updates=12)
    one.walk(until=7)
    other = Process(Sampled(5), updates=12).resume(one.position())
    next(other.epochs.walk(other.loader))
    assert other.loader.epoch == 1


def test_a_position_asked_for_does_not_change_with_the_walk():
    process = Process(Python(5), updates=9)
    position = process.epochs.state_dict()
    process.walk(until=3)
    assert position == {"epoch": 0, "batches": 0, "random": None}


class Placed:
    """A loader that knows its own position, as stateful ones do."""

    def __init__(self, size):
        self.size, self.next = size, 0

    def __iter__(self):
        while self.next < self.size:
            self.next += 1
            yield self.next - 1
        self.next = 0


def test_nothing_is_passed_over_in_a_loader_that_knows_its_own_position(tmp_path):
    seen, loader = [], Placed(7)
    for until in (10, 14, 60):
        with Loop(tmp_path) as loop:
            loop.recorder.start()
            for batch in loop.recorder.batches(loader, stateful=True):
                seen.append(batch)
                loop.step()
                if loop.updates == until:
                    break
    assert seen == [update % 7 for update in range(60)]
