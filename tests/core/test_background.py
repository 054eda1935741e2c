"""What the background writer promises: one job at a time, nothing lost, every error raised, no copy kept."""

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

from snapcore.errors import ProtocolError
from snapcore.run import background
from snapcore.run.background import SnapshotWriter


class Gate:
    """A job that says when it has begun and ends when the test lets it."""

    def __init__(self):
        self.begun, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        self.opened.wait()


@pytest.fixture
def writer():
    with SnapshotWriter() as writer:
        yield writer


@pytest.fixture
def gate(writer):
    """Occupy the writer: a job is running, none is waiting."""
    gate = Gate()
    writer.submit(gate)
    gate.begun.wait()
    yield gate
    gate.opened.set()


def fail_with(error):
    def job():
        raise error

    return job


def in_thread(call):
    """Start `call` in a thread; the event is set once it has returned."""
    returned = threading.Event()
    thread = threading.Thread(target=lambda: (call(), returned.set()), daemon=True)
    thread.start()
    return returned


def python(program, *flags):
    return subprocess.run(
        [sys.executable, *flags, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


def test_jobs_are_done_in_order_in_one_other_thread(writer):
    done = []
    for number in range(20):
        writer.submit(lambda number=number: done.append((number, threading.get_ident())))
    writer.drain()
    assert [number for number, _ in done] == list(range(20))
    assert len({thread for _, thread in done}) == 1
    assert done[0][1] != threading.get_ident()


def test_the_thread_does_not_keep_the_interpreter_alive(writer):
    threads = []
    writer.submit(lambda: threads.append(threading.current_thread()))
    writer.drain()
    assert [(thread.name, thread.daemon) for thread in threads] == [("snapcore-writer", True)]


def test_the_loop_continues_while_a_job_runs_and_one_waits(writer, gate):
    done = []
    writer.reserve()
    writer.submit(lambda: done.append("waiting"))
    assert done == []
    gate.opened.set()
    writer.drain()
    assert done == ["waiting"]


@pytest.mark.parametrize("ask", [lambda writer: writer.reserve(), lambda writer: writer.submit(lambda: None)])
def test_room_is_waited_for_while_a_job_runs_and_one_waits(writer, gate, ask):
    second = Gate()
    writer.submit(second)
    returned = in_thread(lambda: ask(writer))
    assert not returned.wait(0.05)
    gate.opened.set()
    second.begun.wait()
    assert returned.wait(60)
    second.opened.set()


def test_a_reservation_holds_until_the_job_is_submitted(writer, gate):
    writer.reserve()
    writer.reserve()
    writer.submit(lambda: None)


def test_the_very_error_of_a_job_is_raised_once(writer):
    error = ValueError("disk")
    writer.submit(fail_with(error))
    with pytest.raises(ValueError, match="disk") as caught:
        writer.drain()
    assert caught.value is error
    writer.check()
    writer.drain()


def test_check_raises_without_waiting_for_other_jobs(writer):
    error = OSError("disk")
    writer.submit(fail_with(error))
    gate = Gate()
    writer.submit(gate)
    gate.begun.wait()
    with pytest.raises(OSError, match="disk") as caught:
        writer.check()
    assert caught.value is error
    gate.opened.set()


def test_check_says_nothing_while_all_is_well(writer, gate):
    writer.check()


def test_jobs_continue_after_an_error_and_later_errors_are_noted_on_it(writer):
    done = []
    writer.submit(fail_with(OSError("first")))
    writer.submit(fail_with(ValueError("second")))
    writer.submit(lambda: done.append("third"))
    with pytest.raises(OSError, match="first") as caught:
        writer.drain()
    assert done == ["third"]
    assert caught.value.__notes__ == ["a later job failed too: ValueError('second')"]


def test_even_an_exit_in_a_job_reaches_the_loop(writer):
    writer.submit(fail_with(SystemExit(3)))
    with pytest.raises(SystemExit):
        writer.drain()


def test_an_error_taken_by_another_thread_in_between_is_not_raised_twice(writer):
    """Two threads may both see an error before one of them takes it."""
    writer.submit(fail_with(ValueError("disk")))
    with pytest.raises(ValueError, match="disk"):
        writer.drain()
    writer._raise()


def test_closing_finishes_what_was_submitted_and_stops_the_thread():
    writer, gate, done = SnapshotWriter(), Gate(), []
    writer.submit(gate)
    writer.submit(lambda: done.append(1))
    closed = in_thread(writer.close)
    gate.opened.set()
    assert closed.wait(60)
    assert done == [1]
    assert not writer._thread.is_alive()


def test_closing_raises_the_pending_error_and_closing_again_does_nothing():
    writer, error = SnapshotWriter(), ValueError("disk")
    writer.submit(fail_with(error))
    with pytest.raises(ValueError, match="disk") as caught:
        writer.close()
    assert caught.value is error
    writer.close()
    writer.drain()


def test_leaving_the_block_closes():
    done = []
    with SnapshotWriter() as writer:
        writer.submit(lambda: done.append(1))
    assert done == [1]
    writer._thread.join(10)  # it has said that it ended, and does
    assert not writer._thread.is_alive()


def test_a_closed_writer_takes_no_job():
    writer = SnapshotWriter()
    writer.close()
    for ask in (writer.reserve, lambda: writer.submit(lambda: None)):
        with pytest.raises(ProtocolError, match="this writer is closed"):
            ask()


def test_who_waits_for_room_when_the_writer_is_closed_is_refused():
    writer, gate, second, refused = SnapshotWriter(), Gate(), Gate(), []

    def reserve():
        try:
            writer.reserve()
        except ProtocolError as error:
            refused.append(error)

    writer.submit(gate)
    gate.begun.wait()
    writer.submit(second)
    waiting, closing = in_thread(reserve), in_thread(writer.close)
    assert waiting.wait(60)
    gate.opened.set()
    second.opened.set()
    assert closing.wait(60)
    assert len(refused) == 1


def test_a_finished_job_and_its_copy_of_the_weights_are_forgotten(writer):
    copy = np.zeros(3)
    watched = weakref.ref(copy)
    writer.submit(lambda copy=copy: copy.sum())
    del copy
    writer.drain()
    assert watched() is None


def test_however_many_jobs_fail_only_the_first_copy_of_the_weights_waits_to_be_raised(writer):
    def write(weights):
        raise OSError("disk")

    watched = []
    for _ in range(5):
        copy = np.zeros(3)
        watched.append(weakref.ref(copy))
        writer.submit(lambda copy=copy: write(copy))
        del copy
    with pytest.raises(OSError, match="disk"):
        writer.drain()
    gc.collect()
    assert [copy() for copy in watched[1:]] == [None] * 4


UNCLOSED = """
import threading
from snapcore.run.background import SnapshotWriter
writer, main = SnapshotWriter(), threading.main_thread()
writer.submit(main.join)                       # ends only once the program's own code has
writer.submit(lambda: print("written"))
print("the program ends")
"""


def test_jobs_are_still_done_when_the_owner_never_closes():
    result = python(UNCLOSED)
    assert result.stdout == "the program ends\nwritten\n"
    assert (result.returncode, result.stderr) == (0, "")


def test_an_error_that_was_never_raised_is_printed_at_exit_and_fails_the_program():
    result = python(
        "from snapcore.run.background import SnapshotWriter; SnapshotWriter().submit(lambda: 1 / 0); print('done')"
    )
    assert "ZeroDivisionError" in result.stderr
    assert (result.returncode, result.stdout) == (1, "done\n")


def test_at_exit_a_failed_job_is_noted_and_the_status_is_1(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(background.logging, "shutdown", lambda: None)
    monkeypatch.setattr(background, "_FAILED", [])
    background._exit_as_failed()
    assert left == []
    writer = SnapshotWriter()
    writer.submit(fail_with(ValueError("disk")))
    with pytest.raises(ValueError, match="disk"):
        writer._close_at_exit()
    background._exit_as_failed()
    assert left == [1]


def test_at_exit_a_writer_whose_jobs_are_done_changes_nothing(monkeypatch):
    monkeypatch.setattr(background, "_FAILED", [])
    SnapshotWriter()._close_at_exit()
    assert background._FAILED == []


def test_what_must_follow_the_last_job_follows_it_though_the_wait_for_it_is_interrupted():
    """Ctrl-C twice while a slow disk is waited for: the lock must not be another's before the file is written."""
    order, opened = [], threading.Event()
    writer = SnapshotWriter(at_end=lambda: order.append("end"))
    writer.submit(lambda: (opened.wait(), order.append("job")))
    with pytest.raises(KeyboardInterrupt):
        interrupted(writer.close)
    assert order == []
    opened.set()
    writer.close()
    assert order == ["job", "end"]


def interrupted(call):
    """Call it, and have Ctrl-C come while it waits."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    try:
        call()
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_of_what_follows_the_last_job_is_raised_too():
    writer = SnapshotWriter(at_end=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.close()


def test_a_closed_writer_leaves_nothing_to_do_at_exit(monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr("atexit.unregister", registered.remove)
    writer = SnapshotWriter()
    assert len(registered) == 1
    monkeypatch.setattr("atexit.unregister", lambda call: call in registered and registered.remove(call))
    writer.close()
    writer.close()
    assert registered == []


FORKED = """
import os, threading
from snapcore.errors import ProtocolError
from snapcore.run.background import SnapshotWriter
writer, begun, opened = SnapshotWriter(), threading.Event(), threading.Event()
writer.submit(lambda: (begun.set(), opened.wait()))
begun.wait()
writer.submit(lambda: print("by the parent", flush=True))
locked, unlock = threading.Event(), threading.Event()
def hold():
    with writer._changed:
        locked.set()
        unlock.wait()
threading.Thread(target=hold).start()
locked.wait()
child = os.fork()                               # at the worst moment: the child's copy of the lock stays locked
if child == 0:
    for ask in (writer.reserve, lambda: writer.submit(print)):
        try:
            ask()
        except ProtocolError as error:
            print("refused", "make one in this process" in str(error), flush=True)
    writer.check()
    writer.drain()
    writer.close()
    raise SystemExit(0)
assert os.waitpid(child, 0)[1] == 0
unlock.set()
opened.set()
"""


def test_a_forked_child_neither_hangs_nor_does_its_parents_jobs():
    result = python(FORKED, "-W", "ignore")
    assert result.stdout == "refused True\nrefused True\nby the parent\n"
    assert (result.returncode, result.stderr) == (0, "")


def test_in_another_process_nothing_is_waited_for_or_raised(writer, monkeypatch):
    """The same as in a fork, where coverage can see it: there the parent raises the error."""
    writer.submit(fail_with(ValueError("disk")))
    writer.reserve()
    writer.submit(gate := Gate())
    gate.begun.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        writer.check()
        writer.drain()
        with pytest.raises(ProtocolError, match="belongs to process"):
            writer.reserve()
        with pytest.raises(ProtocolError, match="belongs to process"):
            writer.submit(gate)
        writer.close()
    gate.opened.set()
    with pytest.raises(ValueError, match="disk"):
        writer.drain()
