"""Evaluation between updates, epochs by number, and what is left of them after a resume."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from snapcore import CosineCycles, ProtocolError
from snapcore.run import Recorder
from snapcore.store import read_point

from .training import Loop, Training, assert_same, members_of

PLAN = CosineCycles(0.2, 24, 3)  # members after 8, 16 and 24 updates; an epoch has 6


class KilledError(BaseException):
    """A kill: nothing is closed in an orderly way."""


class Shuffled:
    """Six batches in an order drawn from Python's global generator, noise from NumPy's."""

    def __iter__(self):
        order = list(range(6))
        random.shuffle(order)
        for index in order:
            yield np.full((2, 3), index) + np.random.normal(scale=0.1)


def evaluate():
    """Draws, as a data loader does that takes its seed from the global generator."""
    return random.random() + np.random.normal()


class Run:
    """Training that evaluates at every epoch's end, and may be killed after an update."""

    def __init__(self, directory, kill=None, where="update"):
        random.seed(5)
        np.random.seed(5)
        self.training, self.kill, self.where, self.log = Training(), kill, where, []
        self.recorder = Recorder(directory, PLAN, self.training, framework="numpy", resume_every=3)
        self.recorder.start()

    def update(self, batch):
        self.training.update(self.recorder.cursor.lr, batch)
        self.recorder.record(1)
        self.die_if("update")
        return self.recorder.cursor.step

    def die_if(self, where):
        if self.recorder.cursor.step == self.kill and where == self.where:
            self.recorder.position()  # the files are there
            self.recorder.store.close()
            raise KilledError

    def evaluate_inside(self):
        for batch in self.recorder.batches(Shuffled()):
            if self.update(batch) % 6 == 0:
                evaluate()
            self.die_if("evaluated")
            if self.recorder.cursor.step == self.kill and self.where == "asked":
                self.recorder._points.amend()
                self.die_if("asked")
        self.recorder.close()

    def evaluate_between(self):
        for epoch, batches in self.recorder.epochs_of(Shuffled()):
            for batch in batches:
                self.update(batch)
            evaluate()
            self.log.append(epoch)
            self.die_if("evaluated")
        self.recorder.close()
        return self.log


def run(directory, form, **options):
    training = Run(directory, **options)
    return training.evaluate_inside() if form == "batches" else training.evaluate_between()


@pytest.mark.parametrize("kill", [3, 5, 6, 7, 11, 12, 13, 16, 18, 23])
def test_killed_in_an_update_a_loop_that_evaluates_between_epochs_resumes_exactly(tmp_path, kill):
    run(tmp_path / "whole", "epochs")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", "epochs", kill=kill)
    run(tmp_path / "killed", "epochs")
    assert_same(members_of(tmp_path / "killed"), members_of(tmp_path / "whole"))


@pytest.mark.parametrize("kill", [3, 5, 7, 11, 13, 16, 23])
def test_killed_in_an_update_a_loop_that_evaluates_inside_resumes_exactly(tmp_path, kill):
    run(tmp_path / "whole", "batches")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", "batches", kill=kill)
    run(tmp_path / "killed", "batches")
    assert_same(members_of(tmp_path / "killed"), members_of(tmp_path / "whole"))


@pytest.mark.parametrize("kill", [6, 12, 18])
def test_killed_once_the_next_batch_is_asked_for_the_evaluation_before_counts(tmp_path, kill):
    run(tmp_path / "whole", "batches")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", "batches", kill=kill, where="asked")
    run(tmp_path / "killed", "batches")
    assert_same(members_of(tmp_path / "killed"), members_of(tmp_path / "whole"))


@pytest.mark.parametrize("kill", [6, 12, 18])
def test_killed_after_an_evaluation_whose_epoch_is_over_it_is_done_again_and_nothing_differs(tmp_path, kill):
    run(tmp_path / "whole", "epochs")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", "epochs", kill=kill, where="evaluated")
    assert run(tmp_path / "killed", "epochs") == list(range(kill // 6 - 1, 4))
    assert_same(members_of(tmp_path / "killed"), members_of(tmp_path / "whole"))


def test_epochs_are_numbered_and_the_last_ends_with_the_program(tmp_path):
    with Loop(tmp_path, CosineCycles(0.1, 20, 2)) as loop:
        seen = []
        for epoch, batches in loop.recorder.epochs_of(range(6)):
            seen.append((epoch, sum(1 for _ in batches if loop.step() is not None)))
    assert seen == [(0, 6), (1, 6), (2, 6), (3, 2)]


def test_after_a_resume_the_first_epoch_is_the_one_that_was_under_way(tmp_path):
    with Loop(tmp_path) as loop:
        loop.recorder.start()
        for _ in loop.recorder.batches(range(7)):
            loop.step()
            if loop.updates == 17:
                break
    with Loop(tmp_path) as loop:
        loop.recorder.start()
        epoch, batches = next(loop.recorder.epochs_of(range(7)))
        assert (epoch, list(batches)) == (2, [3, 4, 5, 6])


def test_an_epoch_that_the_loop_leaves_early_is_over(tmp_path):
    with Loop(tmp_path) as loop:
        seen = []
        for epoch, batches in loop.recorder.epochs_of(range(100)):
            for batch in batches:
                loop.step()
                if batch == 9:
                    break
            seen.append((epoch, loop.updates))
    assert seen == [(0, 10), (1, 20), (2, 30), (3, 40), (4, 50), (5, 60)]


def test_epochs_that_nobody_walks_are_refused(tmp_path):
    with Loop(tmp_path) as loop, pytest.raises(ProtocolError, match="the loader gave no batch"):
        list(loop.recorder.epochs_of(range(7)))


def test_micro_batches_left_over_at_an_epochs_end_are_given_again(tmp_path):
    """Their gradients were accumulated and are gone."""

    def walk(directory, leave=None):
        with Loop(directory, CosineCycles(0.1, 12, 2)) as loop:
            loop.recorder.start()
            seen = []
            for count, batch in enumerate(loop.recorder.batches(range(10)), 1):
                seen.append(batch)
                if count % 4 == 0:
                    loop.step()
                    seen.append("update")
                if count == leave:
                    break
        return seen

    whole = walk(tmp_path / "whole")
    assert walk(tmp_path / "left", 11) == whole[:13]
    assert walk(tmp_path / "left") == whole[10:]


def test_what_micro_batches_draw_is_drawn_again_after_a_resume(tmp_path):
    def walk(directory, leave=None):
        random.seed(3)
        with Loop(directory, CosineCycles(0.1, 12, 2)) as loop:
            loop.recorder.start()
            seen = []
            for count, _ in enumerate(loop.recorder.batches(Shuffled()), 1):
                seen.append(random.random())  # dropout
                if count % 4 == 0:
                    loop.step()
                if count == leave:
                    break
        return seen

    whole = walk(tmp_path / "whole")
    walk(tmp_path / "left", 15)
    assert walk(tmp_path / "left") == whole[12:]


@pytest.mark.parametrize("kill", [21, 22, 23, 24, 26, 29])
@pytest.mark.parametrize("form", ["batches", "epochs"])
def test_killed_between_micro_batches_what_they_drew_after_the_point_is_drawn_again(tmp_path, form, kill):
    """Four make an update; the point of update 5 comes in an epoch's middle, and those that follow draw (dropout)."""

    def walk(directory, kill=None):
        random.seed(3)
        np.random.seed(3)
        drawn = []
        with Loop(directory, CosineCycles(0.1, 10, 2)) as loop:
            loop.recorder.start()
            first = count = 4 * loop.updates
            recorder, loader = loop.recorder, Shuffled()
            epochs = recorder.epochs_of(loader) if form == "epochs" else [(0, recorder.batches(loader))]
            for _, batches in epochs:
                for _ in batches:
                    drawn.append(random.random())
                    count += 1
                    if count % 4 == 0:
                        loop.step()
                    if count == kill:
                        recorder.position()
                        recorder.store.close()
                        raise KilledError
                drawn.append(evaluate())
        return first, drawn

    whole = walk(tmp_path / "whole")[1]
    with pytest.raises(KilledError):
        walk(tmp_path / "killed", kill)
    first, drawn = walk(tmp_path / "killed")
    assert first == 20
    assert drawn == whole[-len(drawn) :]


@pytest.mark.parametrize("leave", [6, 9, 11, 12, 14, 15, 17])
def test_a_loop_that_numbers_its_batches_goes_on_with_the_number_that_is_next(tmp_path, leave):
    """Four micro-batches make an update, and so do those left at the end of an epoch of ten."""

    def walk(directory, leave=None):
        with Loop(directory, CosineCycles(0.1, 12, 2)) as loop:
            loop.recorder.start()
            updates, waiting = [], []
            for _, batches in loop.recorder.epochs_of("abcdefghij"):
                for number, batch in enumerate(batches, batches.start):
                    waiting.append(batch)
                    leave = leave and leave - 1
                    if number % 4 == 3 or number == 9:
                        loop.step()
                        updates.append("".join(waiting))
                        waiting = []
                    if leave == 0:
                        return updates
        return updates

    assert walk(tmp_path / "whole") == ["abcd", "efgh", "ij"] * 4
    before = walk(tmp_path / "left", leave)
    assert before + walk(tmp_path / "left") == ["abcd", "efgh", "ij"] * 4


def test_an_epoch_that_is_begun_starts_at_0(tmp_path):
    with Loop(tmp_path, CosineCycles(0.1, 20, 2)) as loop:
        starts = []
        for _, batches in loop.recorder.epochs_of(range(10)):
            starts.append(batches.start)
            for _ in batches:
                loop.step()
    assert starts == [0, 0]


@pytest.mark.parametrize("where", ["loader", "sampler", "batch_sampler", "inner", "dataset", "wrapped", "twice"])
def test_the_number_of_an_epoch_is_given_wherever_it_is_asked_for(tmp_path, where):
    called = []

    class Called:
        def set_epoch(self, epoch):
            called.append(epoch)

    class Loader(list):
        pass

    def loader_with(**parts):
        loader = Loader(range(5))
        for name, part in parts.items():
            setattr(loader, name, part)
        return loader

    class Own(Loader, Called):
        pass

    made = {
        "loader": lambda: Own(range(5)),
        "sampler": lambda: loader_with(sampler=Called()),
        "batch_sampler": lambda: loader_with(batch_sampler=Called()),
        "inner": lambda: loader_with(batch_sampler=SimpleNamespace(sampler=Called())),
        "dataset": lambda: loader_with(dataset=Called()),
        "wrapped": lambda: loader_with(base_dataloader=SimpleNamespace(loader=loader_with(sampler=Called()))),
        "twice": lambda: loader_with(
            sampler=(called_once := Called()), batch_sampler=SimpleNamespace(sampler=called_once)
        ),
    }[where]()
    with Loop(tmp_path, CosineCycles(0.1, 15, 3)) as loop:
        for _ in loop.recorder.batches(made):
            loop.step()
    assert called == [0, 1, 2]


def test_a_point_that_a_later_update_has_replaced_is_not_amended(tmp_path):
    with Loop(tmp_path, resume_every=3) as loop:
        for _ in loop.recorder.batches(range(7)):
            loop.step()
            random.random()
            if loop.updates == 7:
                break
        loop.recorder._saving.amend(1, ["of another update"])
        loop.recorder.position()
        assert read_point(tmp_path).state["place"]["step"] == 6
        assert read_point(tmp_path).state["processes"] != ["of another update"]


def test_a_point_stays_as_it_was_once_an_update_is_settled_that_is_not_yet_recorded(tmp_path):
    """As where the optimizer counts, and is asked only now and then."""
    with Loop(tmp_path, resume_every=3) as loop:
        for number, _ in enumerate(loop.recorder.batches(range(7)), 1):
            loop.recorder.epochs.settle()
            if number % 3 == 0:
                loop.step(3)
            loop.recorder.position()
            random.random()
            if number == 5:
                break
        data = read_point(tmp_path).state["processes"][0]["data"]
        assert (read_point(tmp_path).state["place"]["step"], data["batches"]) == (3, 3)
        loop.step(2)


def test_a_loader_that_wraps_itself_is_not_looked_through_for_ever(tmp_path):
    class Wraps(list):
        @property
        def loader(self):
            return Wraps(self)

    with Loop(tmp_path, CosineCycles(0.1, 4, 2)) as loop:
        for _ in loop.recorder.batches(Wraps(range(4))):
            loop.step()
