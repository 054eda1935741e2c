"""The rules for runs on a run of a hundred lines, and on ones that break a single rule each."""

import inspect
import itertools
import logging
import os
import shutil
import threading
import warnings

import numpy as np
import pytest

from snapcore import CycleWarning, SnapcoreError, StoreError
from snapcore.ensemble import combine
from snapcore.store import SnapshotStore
from snapcore.testing import LoopConformance, RunConformance

from .numpy_run import Network, SnapshotRun, Source, probabilities


class TestNumpyRun(LoopConformance):
    framework = "numpy"
    run = SnapshotRun

    def new(self, seed, schedule):
        return Network(seed)

    def init(self, seed, schedule):
        return Network(seed).weights

    def open(self, directory, cycles, subject, **options):
        return self.run(directory, cycles, subject, **options)

    def update(self, subject, x):
        subject.update(x)

    def weights(self, subject):
        return subject.weights

    def moments(self, subject):
        return [subject.velocity]

    def rate(self, subject):
        return subject.rate

    def spoil(self, subject):
        subject.weights["kernel"][0] = np.nan

    def ensemble(self, directory, x):
        return self.run.ensemble(directory, x)


class Rule01(SnapshotRun):
    """The last member is forgotten."""

    def __exit__(self, *error):
        super().__exit__(*error)
        if self.cursor.step == 13:
            with SnapshotStore(self.recorder.directory, "w") as store:
                store.truncate(2)
                store.describe(stopped="finished")


class Rule02(SnapshotRun):
    """The last member has fewer digits than the weights."""

    class make_source(Source):  # noqa: N801
        def capture(self):
            tensors = super().capture()
            return {**tensors, "mean": np.round(tensors["mean"], 3)} if self.network.count == 13 else tensors


class Rule03(SnapshotRun):
    """A copy is made when the writer gets to it; the loop waits a little for that, so that little else shows."""

    class make_source(Source):  # noqa: N801
        def __init__(self, network, fresh):
            super().__init__(network, fresh)
            self.copied = threading.Event()
            self.copied.set()

        def dump(self):
            self.copied.clear()
            return self, super().dump()[1]

        def resolve(self):
            tensors, _ = super().dump()
            self.copied.set()
            return tensors

    def step(self):
        super().step()
        self.source.copied.wait(0.5)


class Rule04(SnapshotRun):
    """Members bear another name."""

    framework = "numbers"


class Rule05(SnapshotRun):
    """The first rate is that of the optimizer."""

    def __init__(self, directory, cycles, network, **options):
        super().__init__(directory, cycles, network, **options)
        if self.cursor.step == 0:
            network.rate = 0.02


class Rule06(SnapshotRun):
    """Of a list of batches the loop is given one too many, whose update is let pass."""

    extra = False

    def batches(self, loader):
        yield from super().batches(loader)
        if isinstance(loader, list):
            self.extra = True
            yield loader[0]

    def step(self):
        if not self.extra:
            super().step()


class Rule07(SnapshotRun):
    """A copy draws a random number, but where members are due and where saving is rehearsed."""

    class make_source(Source):  # noqa: N801
        dumps = 0

        def dump(self):
            self.dumps += 1
            if self.network.count % 2 and self.dumps > 2:
                self.network.noise.random()
            return super().dump()


class Rule08(SnapshotRun):
    """A run is not moved aside, but deleted."""

    def __init__(self, directory, cycles, network, *, resume=True, **options):
        if not resume:
            shutil.rmtree(directory)
        super().__init__(directory, cycles, network, **options)


class Rule09(SnapshotRun):
    """A run of another program is moved aside."""

    def __init__(self, directory, cycles, network, **options):
        try:
            super().__init__(directory, cycles, network, **options)
        except StoreError as error:
            if "another program" not in str(error):
                raise
            super().__init__(directory, cycles, network, resume=False, **options)


class Rule10(SnapshotRun):
    """What another writes is left to it, and the run written elsewhere."""

    def __init__(self, directory, cycles, network, **options):
        try:
            super().__init__(directory, cycles, network, **options)
        except StoreError as error:
            if "being written" not in str(error):
                raise
            super().__init__(directory / "other", cycles, network, **options)


class Rule11(SnapshotRun):
    """Without an error it ends in silence."""

    def __exit__(self, kind, error, trace):
        logging.disable(logging.NOTSET if kind else logging.CRITICAL)
        try:
            return super().__exit__(kind, error, trace)
        finally:
            logging.disable(logging.NOTSET)


class Rule12(SnapshotRun):
    """On leaving early the velocity is forgotten."""

    def __exit__(self, *error):
        self.network.velocity[:] = 0
        return super().__exit__(*error)


class Rule13(SnapshotRun):
    """On resuming from a member the velocity is forgotten."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.cursor.at_member:
            self.network.velocity[:] = 0


class Rule14(SnapshotRun):
    """There are no resume points between members."""

    def __init__(self, *args, resume_every=None, **options):
        super().__init__(*args, **options)


class Rule15(SnapshotRun):
    """At a SIGTERM the run is finished."""

    def step(self):
        if self.recorder.asked_to_stop:
            self.recorder.finish("SIGTERM")
            self.recorder.close()
        super().step()


class Rule16(SnapshotRun):
    """What the loop raises is swallowed."""

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        return isinstance(error, Exception) and not isinstance(error, SnapcoreError)


class Rule17(SnapshotRun):
    """Fresh weights are asked for by the number of the member before."""

    def __init__(self, *args, init=None, **options):
        super().__init__(*args, init=init and (lambda number: init(number - 1)), **options)


class Rule18(SnapshotRun):
    """Without fresh weights those at the beginning will do."""

    def __init__(self, directory, cycles, network, *, init=None, **options):
        begun = {name: array.copy() for name, array in network.weights.items()}
        super().__init__(directory, cycles, network, init=init or (lambda number: begun), **options)


class Rule19(SnapshotRun):
    """The first member's buffers stay away if moments are kept."""

    class make_source(Source):  # noqa: N801
        def restore(self, tensors, *, optimizer):
            mean = self.network.weights["mean"]
            super().restore(tensors, optimizer=optimizer)
            if optimizer == "keep":
                self.network.weights["mean"] = mean


class Rule20(SnapshotRun):
    """Moments are never reset."""

    class make_source(Source):  # noqa: N801
        def restore(self, tensors, *, optimizer):
            super().restore(tensors, optimizer="keep")


class Rule21(SnapshotRun):
    """A restart is left to the process that took the member."""

    class make_source(Source):  # noqa: N801
        resumed = False

        def load(self, tensors, values):
            super().load(tensors, values)
            self.resumed = True

        def restore(self, tensors, *, optimizer):
            if not self.resumed:
                super().restore(tensors, optimizer=optimizer)
            self.resumed = False


class Rule22(SnapshotRun):
    """What is not finite is zero."""

    class make_source(Source):  # noqa: N801
        def dump(self):
            tensors, values = super().dump()
            return {name: np.nan_to_num(array) for name, array in tensors.items()}, values


class Rule23(SnapshotRun):
    """When the disk refuses, a note is left."""

    def __exit__(self, *error):
        try:
            return super().__exit__(*error)
        finally:
            if self.recorder.failed:
                (self.recorder.directory / ".tmp-note").touch()


class Rule24(SnapshotRun):
    """An ensemble is the geometric mean."""

    @classmethod
    def ensemble(cls, directory, x):
        _, members = super().ensemble(directory, x)
        return np.exp(np.log(members).mean(0)), members


class Rule25(SnapshotRun):
    """It is finished one update too early."""

    @property
    def finished(self):
        return super().finished or self.cursor.step == 12


class Rule26(SnapshotRun):
    """Updates after the end are ignored."""

    def step(self):
        if not super().finished:
            super().step()


class Rule27(SnapshotRun):
    """An epoch has four batches."""

    def batches(self, loader):
        class Cut:
            def __iter__(self):
                return itertools.islice(loader, 4)

        return super().batches(Cut())


class Rule28(SnapshotRun):
    """On resuming the data begin anew."""

    def batches(self, loader):
        self.recorder.epochs.load_state_dict({"epoch": 0, "batches": 0, "random": None})
        return super().batches(loader)


class Rule29(SnapshotRun):
    """An exception is an end like any other."""

    def __exit__(self, *error):
        self.close()


class Rule30(SnapshotRun):
    """Late members are nothing to speak of."""

    def step(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CycleWarning)
            super().step()


class Rule31(SnapshotRun):
    """The end is always a member."""

    def finish(self, reason):
        if self.cursor.at_member:
            self.recorder.record(1)
        super().finish(reason)


class Rule32(SnapshotRun):
    """An ensemble takes what there is."""

    @classmethod
    def ensemble(cls, directory, x):
        store = SnapshotStore(directory)
        members = [probabilities(store.load(member.index), x) for member in store.members]
        return combine(members), np.stack(members)


class Rule33(SnapshotRun):
    """There is a resume point from the beginning."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.cursor.step == 0:
            self.recorder._points.newest = -1
            self.recorder._points.save()


class Rule34(SnapshotRun):
    """Every update counts, whenever it was done."""

    @property
    def updates(self):
        return self.network.count - self.before


RULES = sorted(name for name in dir(LoopConformance) if name.startswith("test_rule_"))
BROKEN = [rule for rule in SnapshotRun.__subclasses__() if rule.__name__.startswith("Rule")]


@pytest.fixture
def keeps(tmp_path, caplog, monkeypatch):
    """Whether a suite keeps a rule; what is written need not reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def keeps(suite, name):
        rule, fixtures = getattr(suite, name), {"tmp_path": tmp_path / name, "caplog": caplog}
        caplog.clear()
        try:
            rule(**{each: fixtures[each] for each in inspect.signature(rule).parameters})
        except (AssertionError, SnapcoreError, pytest.fail.Exception):
            return False
        return True

    return keeps


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_run_that_breaks_one_rule_fails_at_exactly_that_rule(broken, keeps):
    class Suite(TestNumpyRun):
        framework, patience, run = "numpy", 0.5, broken

    failed = [rule for rule in RULES if not keeps(Suite(), rule)]
    assert [rule[5:12] for rule in failed] == [broken.__name__.replace("Rule", "rule_")]


def test_every_rule_has_a_run_that_breaks_it():
    assert [rule[5:12].replace("rule_", "Rule") for rule in RULES] == [broken.__name__ for broken in BROKEN]


@pytest.mark.parametrize("name", ["new", "train", "init", "weights", "moments", "rate", "spoil", "ensemble"])
def test_a_suite_must_say_how_its_framework_does_it(name):
    verb = getattr(RunConformance(), name)
    arguments = {
        each: None
        for each, parameter in inspect.signature(verb).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    with pytest.raises(NotImplementedError):
        verb(**arguments)


@pytest.mark.parametrize(("name", "count"), [("open", 3), ("update", 2)])
def test_a_suite_of_a_loop_must_say_how_it_is_done(name, count):
    with pytest.raises(NotImplementedError):
        getattr(LoopConformance(), name)(*[None] * count)
