"""SIGTERM, as `timeout` and cluster schedulers send it: a resume point, no member, exit code 143."""

import signal

import pytest

from snapcore.store import SnapshotStore, read_point

from .harness import CYCLE, EVERY, HOLD, METHODS, POINT, UPDATES, Fault, Spawned, assert_same, finished, wait_for

RECORD = "snapcore.run.recorder:Recorder.record"
TOLD_TO_END = 143


def told(count):
    """SIGTERM comes while the run is at its `count`-th resume point."""
    return Fault(RECORD, "SIGTERM", count=count)


@pytest.mark.exhaustive(keep=2)
@pytest.mark.parametrize(
    ("updates", "method"),
    [(EVERY, "star"), *((CYCLE, method) for method in METHODS), (30, "snapshot"), (UPDATES - EVERY, "singlecycle")],
)
def test_a_run_asked_to_stop_writes_a_resume_point_and_no_member_and_goes_on_exactly(
    zygote, reference, tmp_path, method, updates
):
    directory = tmp_path / "run"
    child = zygote.start(directory, method, fault=told(updates // EVERY))
    assert child.wait() == TOLD_TO_END, child.output
    assert read_point(directory).state["place"]["step"] == updates
    assert [member.step for member in SnapshotStore(directory).members] == list(range(CYCLE, updates + 1, CYCLE))
    finished(zygote.start(directory, method))
    assert_same(directory, reference(method).directory)


def test_a_run_asked_to_stop_with_its_last_update_is_only_scored_when_started_again(zygote, reference, tmp_path):
    directory = tmp_path / "run"
    assert zygote.start(directory, fault=told(UPDATES // EVERY)).wait() == TOLD_TO_END
    assert SnapshotStore(directory).stopped == "finished"
    assert not (directory / POINT).exists()
    finished(zygote.start(directory))
    assert_same(directory, reference().directory)


def test_a_run_asked_to_stop_again_and_again_ends_as_the_undisturbed_one(zygote, reference, tmp_path):
    directory, codes = tmp_path / "run", []
    while not codes or codes[-1] == TOLD_TO_END:
        codes.append(zygote.start(directory, fault=told(3)).wait())
    assert codes == [*[TOLD_TO_END] * (UPDATES // (3 * EVERY)), 0]
    assert_same(directory, reference().directory)


@pytest.mark.exhaustive
def test_the_command_line_asked_to_stop_from_outside_goes_on_exactly(reference, tmp_path):
    directory = tmp_path / "run"
    (tmp_path / HOLD).touch()
    process = Spawned(directory)
    wait_for(directory / POINT)
    process.send(signal.SIGTERM)
    (tmp_path / HOLD).unlink()
    assert process.wait() == TOLD_TO_END, process.output
    assert (directory / POINT).exists()
    assert SnapshotStore(directory).members == ()
    finished(Spawned(directory))
    assert_same(directory, reference().directory)


def test_a_second_sigterm_ends_a_run_that_does_not_come_back(zygote, reference, tmp_path):
    directory = tmp_path / "run"
    (tmp_path / HOLD).touch()
    second = Fault("snapcore.run.sigterm:_Process._note", "SIGTERM", after=True)
    child = zygote.start(directory, fault=second)
    wait_for(directory / POINT)
    child.send(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM, child.output
    (tmp_path / HOLD).unlink()
    finished(zygote.start(directory))
    assert_same(directory, reference().directory)
