"""Looks at an optimizer's count: as few as can be, never one too late, and one at the end."""

import linecache
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import CosineCycles, CycleWarning, DivergedError, ProtocolError
from snapcore.run import CountedRun, Recorder
from snapcore.store import SnapshotStore, read_point

from .training import Loop


class Numbers:
    """What is trained here: a number that only the optimizer knows, and counts."""

    fresh = None

    def __init__(self):
        self.count = 0

    def capture(self):
        return {"updates": np.array(self.count)}

    def settings(self):
        return {}

    def restore(self, tensors, *, optimizer):
        raise AssertionError("no program here restarts")

    def dump(self):
        return {"weights/updates": np.array(self.count)}, {}

    def load(self, tensors, values):
        self.count = int(tensors["weights/updates"])

    def random_state(self):
        return None

    def set_random_state(self, state):
        assert state is None


class Counting(CountedRun):
    """Notes each look: the updates done by then, and whether something was due."""

    def __init__(self, *args, **options):
        self.looks = []
        super().__init__(*args, **options)

    def look(self, **options):
        events = super().look(**options)
        self.looks.append((self.cursor.step, bool(events)))
        return events


def walked(directory, updates_by_call, every=None, **options):
    """Walk a program by calls that do so many updates each; return where it looked, and what was due at each step."""
    numbers = Numbers()
    cycles = CosineCycles(lr=0.1, steps=600, cycles=3)
    recorder = Recorder(directory, cycles, numbers, framework="numpy", resume_every=every)
    run = Counting(recorder, lambda: numbers.count, **options)
    run.begun_at = 0
    for updates in updates_by_call:
        if numbers.count + updates > 600:
            break
        numbers.count += updates
        if run.call():
            run.look()
    looks = list(run.looks)
    run.close(exact=True)
    return looks


def test_a_loop_of_one_update_a_call_looks_at_the_first_and_at_each_boundary(tmp_path):
    assert walked(tmp_path, [1] * 600) == [(1, False), (200, True), (400, True), (600, True)]


def test_where_a_calls_updates_are_known_the_first_is_not_looked_at(tmp_path):
    assert walked(tmp_path, [1] * 600, per_call=1) == [(200, True), (400, True), (600, True)]


def test_other_lengths_are_looked_at_too(tmp_path):
    expected = [(step, step % 200 == 0) for step in (1, 150, 200, 300, 400, 450, 600)]
    assert walked(tmp_path, [1] * 600, every=150) == expected


def test_calls_of_several_updates_are_known_after_the_first(tmp_path):
    assert walked(tmp_path, [20] * 30) == [(20, False), (200, True), (400, True), (600, True)]


@pytest.mark.parametrize("accumulated", [2, 3, 8])
def test_micro_batches_are_looked_at_more_and_more_often_towards_a_boundary(tmp_path, accumulated):
    """Of n calls only the last does an update: looks come too early, and boundaries are met all the same."""
    looks = walked(tmp_path, [int(call % accumulated == 0) for call in range(1, 600 * accumulated + 1)])
    assert [done for done, due in looks if due] == [200, 400, 600]
    assert len(looks) < 150


@pytest.mark.parametrize("accumulated", [2, 3, 8])
def test_where_the_accumulation_is_known_only_boundaries_are_looked_at(tmp_path, accumulated):
    calls = iter(range(600 * accumulated + 1))
    looks = walked(
        tmp_path,
        (int(call % accumulated == 0) for call in range(1, 600 * accumulated + 1)),
        per_call=1,
        accumulation=accumulated,
        unfinished=lambda: 0,  # at every look an update is just done
    )
    assert looks == [(200, True), (400, True), (600, True)]
    assert next(calls) == 0


def test_micro_batches_of_an_update_that_is_half_done_are_not_counted_on(tmp_path):
    """Resumed in the middle of an accumulated update: the first boundary is that many calls nearer."""
    numbers, half = Numbers(), [3]
    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=20, cycles=2), numbers, framework="numpy")
    run = Counting(recorder, lambda: numbers.count, per_call=1, accumulation=4, unfinished=lambda: half[0])
    run.begun_at = 0
    due = [run.call() for _ in range(40)]
    assert due.index(True) == 36  # 40 micro-batches until update 10, and 3 are done
    run.close(exact=False)


@given(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=1000))
@settings(max_examples=30, deadline=None)
def test_no_boundary_is_passed_unseen_while_calls_do_one_update_or_none(updates):
    done = sum(updates)
    with tempfile.TemporaryDirectory() as folder:
        looks = walked(folder, updates)
    assert [step for step, due in looks if due] == [due for due in (200, 400, 600) if due <= done]


def test_a_count_that_is_smaller_than_before_is_refused(loop):
    loop.walk(27)
    loop.weights["updates"] -= 20
    with pytest.raises(ProtocolError, match="counts 7 updates, and had counted 20 before: when its state"):
        loop.run.look()
    loop.weights["updates"] += 20


def test_where_nothing_counts_calls_are_updates(tmp_path):
    numbers = Numbers()
    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=6, cycles=2), numbers, framework="numpy")
    run = CountedRun(recorder, lambda: 1 / 0)
    for done in range(1, 7):
        run.call()
        assert run.updates == done
        run.look()
    assert run.updates == 6
    run.close(exact=True)


def test_what_cannot_be_right_is_refused_before_it_is_recorded(tmp_path):
    seen = []

    def check(updates, calls):
        seen.append((updates, calls))
        if updates > calls:
            raise ProtocolError("too many")

    numbers = Numbers()
    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=6, cycles=2), numbers, framework="numpy")
    run = CountedRun(recorder, lambda: numbers.count, check=check)
    run.begun_at = 0
    numbers.count = 2
    run.call()
    with pytest.raises(ProtocolError, match="too many"):
        run.look()
    assert run.cursor.step == 0
    run.look(unseen=1)
    assert (run.cursor.step, seen) == (2, [(2, 1), (2, 2)])
    run.close(exact=True)


class CountedLoop(Loop):
    """A loop whose weight is its optimizer's count: `step` looks at it only where something may be due."""

    def __init__(self, directory, **options):
        super().__init__(directory, **options)
        self.run = CountedRun(self.recorder, self.read_count)
        self.run.begun_at = self.looks = 0

    def read_count(self):
        self.looks += 1
        return self.updates

    def update(self, n=1):
        self.weights["updates"] += n

    def step(self):
        self.recorder.epochs.settle()
        if self.run.call():
            self.run.look()

    def walk(self, updates):
        for _ in range(updates):
            self.update()
            self.step()


@pytest.fixture
def loop(tmp_path):
    loop = CountedLoop(tmp_path)
    yield loop
    loop.recorder.close()


def warned(caplog):
    return [record.getMessage().split(": ", 1)[1] for record in caplog.records]


@pytest.mark.parametrize(("calls", "more"), [(27, 0), (27, 1), (20, 1), (20, 0)])
def test_a_run_that_is_closed_resumes_from_where_its_loop_was(loop, tmp_path, calls, more, caplog):
    loop.walk(calls)
    assert loop.recorder.cursor.step == 20
    loop.update(more)
    loop.run.close(exact=True)
    done = calls + more
    assert (loop.recorder.cursor.step, read_point(tmp_path).state["place"]["step"]) == (done, done)
    assert warned(caplog) == [f"left after {done} of 60 updates; it resumes after update {done}"]


def test_a_run_that_is_closed_as_it_may_not_resume_says_how_far_its_calls_came(loop, tmp_path, caplog):
    loop.walk(27)
    looks = loop.looks
    loop.run.close(exact=False)
    assert (loop.looks, read_point(tmp_path).state["place"]["step"]) == (looks, 20)
    assert warned(caplog) == ["left after 27 of 60 updates; it resumes after update 20"]


@pytest.mark.parametrize("first", [True, False])
def test_closing_twice_is_closing_once_though_updates_come_in_between(loop, tmp_path, first, caplog):
    loop.walk(27)
    loop.run.close(exact=first)
    loop.update(20)
    looks = loop.looks
    for exact in (True, False):
        loop.run.close(exact=exact)
    assert (loop.looks, loop.recorder.cursor.step, len(warned(caplog))) == (looks, 27, 1)
    assert [member.step for member in SnapshotStore(tmp_path).members] == [20]


def test_an_end_that_cannot_be_looked_at_frees_the_directory_and_leaves_the_resume_point_before(loop, tmp_path):
    loop.walk(27)
    loop.weights["updates"] -= 20
    with pytest.raises(ProtocolError, match="counts 7 updates, and had counted 20 before"):
        loop.run.close(exact=True)
    assert loop.run.ended
    loop.run.close(exact=True)
    with SnapshotStore(tmp_path, "w") as store:
        assert [member.step for member in store.members] == [20]
    assert read_point(tmp_path).state["place"]["step"] == 20


def test_finishing_takes_an_unfinished_member_of_all_that_was_done(loop, tmp_path):
    loop.walk(27)
    loop.run.finish("out of time")
    loop.update()
    with pytest.raises(ProtocolError, match="stopped after 27 updates"):
        loop.step()
    loop.run.close(exact=True)
    members = SnapshotStore(tmp_path).members
    assert [(member.step, member.unfinished) for member in members] == [(20, False), (27, True)]
    assert SnapshotStore(tmp_path).load(2)["updates"] == 27


@pytest.mark.parametrize("exact", [True, False])
def test_the_end_is_reached_with_the_program_and_updates_after_it_are_not_looked_at(loop, tmp_path, exact):
    loop.walk(59)
    assert not loop.run.ended
    loop.walk(1)
    assert loop.run.ended
    loop.update()
    loop.run.finish("enough")
    loop.run.close(exact=exact)
    assert (loop.recorder.cursor.step, SnapshotStore(tmp_path).stopped) == (60, "finished")


def test_a_boundary_that_is_only_seen_at_the_end_is_taken_late_and_warned_of_at_the_loops_line(loop, tmp_path):
    loop.walk(19)
    loop.update(4)
    with pytest.warns(CycleWarning, match=r"3 updates late.*call run.step\(\), or the callback") as caught:
        loop.run.close(exact=True)
    (line,) = (linecache.getline(one.filename, one.lineno).strip() for one in caught)
    assert line == "loop.run.close(exact=True)"
    assert [member.step for member in SnapshotStore(tmp_path).members] == [23]


@pytest.mark.parametrize(("last", "used"), [("taken", 5), ("updated", 6)])
def test_the_last_batch_is_given_again_unless_an_update_was_made_of_it(loop, tmp_path, last, used):
    for position, _ in enumerate(loop.recorder.batches(range(9)), 1):
        if position == 6:
            break
        loop.walk(1)
    if last == "updated":
        loop.update()
    loop.run.close(exact=True)
    state = read_point(tmp_path).state
    assert (state["place"]["step"], state["processes"][0]["data"]["batches"]) == (used, used)


def test_an_error_of_the_writer_is_raised_once(tmp_path):
    loop = CountedLoop(tmp_path, resumable=False)
    loop.weights["updates"] = np.array(np.nan)
    loop.recorder.record(20)
    with pytest.raises(DivergedError, match="member 1 at update 20"):
        loop.run.close(exact=False)
    loop.run.close(exact=True)


def test_closing_after_a_step_has_raised_the_error_raises_nothing_more(tmp_path):
    """As `try: …, finally: run.close()` does: another error would stand before the one to read."""
    loop = CountedLoop(tmp_path, resumable=False)
    loop.weights["updates"] = np.array(np.nan)
    loop.recorder.record(20)
    with pytest.raises(DivergedError, match="member 1 at update 20"):
        loop.recorder.position()
    loop.run.call()
    loop.run.close(exact=True)
    assert not loop.looks


@pytest.mark.parametrize("hands_back", [True, False])
def test_after_every_epoch_the_run_is_where_the_loop_is(tmp_path, hands_back):
    """What is due there is taken at once, unless a restart must be handed back: then at the call that follows."""
    numbers = Numbers()
    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=60, cycles=3), numbers, framework="numpy")
    run = CountedRun(recorder, lambda: numbers.count, hands_back=hands_back)
    run.begun_at, seen = 0, []

    class Loader(list):
        sampler = None

        def __iter__(self):
            seen.append(run.cursor.step)
            return super().__iter__()

    for number, _ in enumerate(run.batches(Loader(range(8))), 1):
        numbers.count += 1
        recorder.epochs.settle()
        unseen = number == 40 and not hands_back  # an epoch's last update, without a call after it
        if not unseen and run.call():
            run.look()
    run.close(exact=True)
    assert seen == [0, 8, 16, 24, 32, 40, 48, 56]


def test_the_samplers_set_epoch_is_called_through_the_run(tmp_path):
    epochs, numbers = [], Numbers()

    class Sampler:
        def set_epoch(self, epoch):
            epochs.append(epoch)

    class Loader(list):
        sampler = Sampler()

    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=6, cycles=2), numbers, framework="numpy")
    run = CountedRun(recorder, lambda: numbers.count)
    run.begun_at = 0
    for _ in run.batches(Loader("abc")):
        numbers.count += 1
        run.call()
        run.look()
    run.close(exact=True)
    assert epochs == [0, 1]


def followed(directory, rate, *, finish=None):
    """Walk by batches at a rate that is known; return what members record."""
    numbers = Numbers()
    recorder = Recorder(directory, CosineCycles(lr=0.1, steps=20, cycles=2), numbers, framework="numpy")
    run = CountedRun(recorder, lambda: numbers.count, hands_back=True, used_rate=lambda step: rate and (rate, "a hand"))
    run.begun_at = 0
    for _ in run.batches(range(3)):
        numbers.count += 1
        recorder.epochs.settle()
        if run.call():
            run.look()
        if numbers.count == finish:
            run.finish("enough")
    run.close(exact=True)
    return [(member.step, member.lr) for member in SnapshotStore(directory).members]


@pytest.mark.parametrize("finish", [None, 13])
def test_the_rate_that_was_used_is_what_members_record(tmp_path, finish):
    with pytest.warns(CycleWarning, match=r"update 1 was done at the rate 0\.3, .*: a hand sets it") as caught:
        found = followed(tmp_path / "run", 0.3, finish=finish)
    assert found == [(10, 0.3), (finish or 20, 0.3)]
    assert len([each for each in caught if "a hand" in str(each.message)]) == 1


def test_where_no_rate_is_known_the_schedules_is_recorded(tmp_path):
    cycles = CosineCycles(lr=0.1, steps=20, cycles=2)
    assert followed(tmp_path / "run", None) == [(10, cycles(9)), (20, cycles(19))]


def test_before_the_first_update_there_is_no_rate_to_be_asked_for(tmp_path):
    numbers = Numbers()
    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=20, cycles=2), numbers, framework="numpy")
    run = CountedRun(recorder, lambda: numbers.count, used_rate=lambda step: pytest.fail(f"asked for step {step}"))
    run.begun_at = 0
    assert run.call()
    assert run.look() == ()
    run.close(exact=False)


def test_batches_that_are_recorded_may_fill_several_epochs_before_an_update_but_not_for_ever(tmp_path):
    numbers = Numbers()
    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=20, cycles=2), numbers, framework="numpy")
    run = CountedRun(recorder, lambda: numbers.count)
    run.begun_at = 0

    def loop():
        for number, _ in enumerate(run.batches(range(7)), 1):
            numbers.count = min(number // 500, 3)
            recorder.epochs.settle()
            if run.call():
                run.look()

    with pytest.raises(ProtocolError, match=r"no update in 1001 batches: call run\.step\(\)"):
        loop()
    assert recorder.cursor.step == 3
    run.close(exact=False)


def test_epochs_of_a_loader_that_keeps_its_own_position_are_not_walked_through_again(tmp_path):
    numbers = Numbers()
    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=20, cycles=2), numbers, framework="numpy")
    run = CountedRun(recorder, lambda: numbers.count)
    run.begun_at = 0
    recorder.epochs.load_state_dict({"epoch": 4, "batches": 2, "random": recorder._points.random_state()})
    for stateful, first in ((True, 0), (False, 2)):
        epoch, batches = next(run.epochs_of(range(7), stateful=stateful))
        assert (epoch, next(batches)) == (4, first)
    run.close(exact=False)


def test_where_a_restart_is_handed_back_what_is_due_at_an_epochs_end_is_left_to_the_call(tmp_path):
    numbers = Numbers()
    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=8, cycles=2), numbers, framework="numpy")
    run, seen = CountedRun(recorder, lambda: numbers.count, hands_back=True), []
    run.begun_at = 0

    def loader():
        yield from range(4)

    class Loader:
        def __iter__(self):
            return loader()

    for _ in run.batches(Loader()):
        numbers.count += 1
        recorder.epochs.settle()
        if numbers.count % 4 and run.call():
            run.look()
        elif numbers.count % 4 == 0:
            run.call()
            seen.append(run.cursor.step)
            run.look()
    run.close(exact=True)
    assert seen == [1, 4]


def test_an_epochs_last_update_that_is_due_and_not_called_for_is_left_where_a_restart_is_handed_back(tmp_path):
    numbers = Numbers()
    recorder = Recorder(tmp_path, CosineCycles(lr=0.1, steps=8, cycles=2), numbers, framework="numpy")
    run = CountedRun(recorder, lambda: numbers.count, hands_back=True)
    run.begun_at = 0
    batches = run.batches([1, 2, 3, 4])
    for _ in range(4):
        next(batches)
        numbers.count += 1
        recorder.epochs.settle()
        run.call()
    next(batches)  # the end of the epoch has been passed
    assert run.cursor.step == 0
    batches.close()
    run.look()
    run.close(exact=True)
