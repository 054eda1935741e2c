"""Two processes and one run directory: the second is refused, whatever it is, and readers never wait."""

import signal

import pytest

from snapcore.store import SnapshotStore

from .harness import Fault, arguments, assert_same, finished

STOPPED = None
MIDWAY = Fault("os:replace", "SIGSTOP", match="snapshot-002")
"""The second member is on disk, and does not have its name yet."""


@pytest.fixture
def first(zygote, tmp_path):
    """A run that has stopped while it writes its second member."""
    child = zygote.start(tmp_path / "run", fault=MIDWAY)
    assert child.wait() is STOPPED
    return child


def test_a_second_start_is_refused_and_the_first_goes_on(zygote, reference, tmp_path, first):
    for more in ((), ("--no-resume",)):
        second = zygote.command(arguments(tmp_path / "run", "snapshot", *more), tmp_path / "second")
        assert second.wait() == 1
        assert second.output.endswith("/run is being written by another run; wait for it, or choose another\n")
    first.send(signal.SIGCONT)
    finished(first)
    assert_same(tmp_path / "run", reference().directory)


def test_a_second_start_takes_over_once_the_first_is_dead(zygote, reference, tmp_path, first):
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    finished(zygote.start(tmp_path / "run"))
    assert_same(tmp_path / "run", reference().directory)


def test_readers_of_a_run_that_is_being_written_see_the_members_that_are_whole(zygote, tmp_path, first):
    for command, said in (("verify", "1 member, each as it was written"), ("inspect", "member 1: snapshot-001")):
        reader = zygote.command([command, str(tmp_path / "run")], tmp_path / command)
        finished(reader)
        assert said in reader.output
    assert [member.index for member in SnapshotStore(tmp_path / "run").members] == [1]
    first.send(signal.SIGKILL)
    first.wait()


def test_two_starts_at_once_end_as_one_run(zygote, reference, tmp_path):
    directory = tmp_path / "run"
    both = [zygote.command(arguments(directory), tmp_path / name) for name in ("one", "two")]
    codes = [child.wait() for child in both]
    assert 0 in codes, [child.output for child in both]
    assert_same(directory, reference().directory)
