"""SIGTERM: noted, answered once, and handed back."""

import gc
import os
import signal
import subprocess
import sys
import threading

import pytest

from snapcore.run.sigterm import EXIT_CODE, SigtermHandler


@pytest.fixture
def earlier():
    """A handler of the program's own; what it was called with."""
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    yield called
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_a_signal_is_noted_and_ends_nothing(earlier):
    termination = SigtermHandler()
    assert not termination.received
    terminate()
    assert termination.received
    assert earlier == []
    termination.remove()


def test_the_handler_before_is_put_back(earlier):
    before = signal.getsignal(signal.SIGTERM)
    termination = SigtermHandler()
    assert signal.getsignal(signal.SIGTERM) != before
    termination.remove()
    assert signal.getsignal(signal.SIGTERM) is before
    termination.remove()  # once is enough
    terminate()
    assert (earlier, termination.received) == ([signal.SIGTERM], False)


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_what_the_system_did_before_is_put_back(earlier, before):
    signal.signal(signal.SIGTERM, before)
    SigtermHandler().remove()
    assert signal.getsignal(signal.SIGTERM) == before


def test_where_another_language_had_the_signal_the_system_gets_it(earlier, monkeypatch):
    install = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: install(number, handler) and None)
    termination = SigtermHandler()
    termination.remove()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_that_came_later_stays_and_may_hand_the_signal_on(earlier):
    termination = SigtermHandler()
    ours = signal.getsignal(signal.SIGTERM)
    heard = []

    def later(number, frame):
        heard.append(number)
        ours(number, frame)

    signal.signal(signal.SIGTERM, later)
    terminate()
    assert (len(heard), termination.received, earlier) == (1, True, [])
    termination.remove()
    assert signal.getsignal(signal.SIGTERM) is later
    terminate()
    assert (len(heard), len(earlier)) == (2, 1)


def test_one_that_is_removed_before_a_later_one_keeps_no_signal_to_itself(earlier):
    first, second = SigtermHandler(), SigtermHandler()
    first.remove()
    terminate()
    assert (first.received, second.received) == (False, True)
    second.remove()
    terminate()
    assert earlier == [signal.SIGTERM]


def test_a_second_signal_goes_to_the_handler_before(earlier):
    termination = SigtermHandler()
    terminate()
    terminate()
    assert earlier == [signal.SIGTERM]
    terminate()
    assert earlier == [signal.SIGTERM] * 2
    assert termination.received


def test_a_second_signal_is_ignored_where_signals_were(earlier):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    termination = SigtermHandler()
    terminate()
    terminate()
    assert termination.received
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_second_signal_is_the_systems_where_there_is_no_handler(earlier, monkeypatch):
    raised = []
    monkeypatch.setattr(signal, "raise_signal", lambda number: raised.append((number, signal.getsignal(number))))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    handler = SigtermHandler()
    terminate()
    assert raised == []
    terminate()
    assert raised == [(signal.SIGTERM, signal.SIG_DFL)]
    handler.remove()


def test_a_second_signal_ends_a_program_that_has_no_handler():
    ended = python(
        "import os, signal\n"
        "from snapcore.run.sigterm import SigtermHandler\n"
        "termination = SigtermHandler()\n"
        "for _ in range(2):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(termination.received, flush=True)\n"
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "True\n")


def test_a_forked_process_dies_of_it_and_the_parent_hears_nothing():
    ended = python(
        "import os, signal\n"
        "from snapcore.run.sigterm import SigtermHandler\n"
        "termination = SigtermHandler()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os._exit(0)\n"
        "print(os.WTERMSIG(os.waitpid(child, 0)[1]), termination.received)\n"
    )
    assert (ended.returncode, ended.stdout) == (0, f"{signal.SIGTERM:d} False\n"), ended.stderr


def test_leaving_gives_the_handler_before_its_turn_and_exits_as_the_signal_would(earlier):
    before = signal.getsignal(signal.SIGTERM)
    termination = SigtermHandler()
    with pytest.raises(SystemExit) as caught:
        termination.leave()
    assert caught.value.code == EXIT_CODE == 143
    assert earlier == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_leaving_exits_where_there_was_no_handler(earlier):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit):
        SigtermHandler().leave()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_a_thread_nothing_is_installed_and_leaving_ends_the_thread_alone(earlier):
    before, caught = signal.getsignal(signal.SIGTERM), []

    def run():
        termination = SigtermHandler()
        caught.append(signal.getsignal(signal.SIGTERM))
        termination.remove()
        try:
            termination.leave()
        except SystemExit as error:
            caught.append(error.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught == [before, 143]
    assert earlier == []


def test_one_made_in_the_main_thread_is_not_removed_from_another(earlier):
    termination = SigtermHandler()
    installed = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=termination.remove)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == installed
    termination.remove()


# ------------------------------------------------------------------------------------------------ Ctrl-C


@pytest.fixture
def pythons_own():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler  # it is back


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("pythons_own")
def test_the_first_ctrl_c_is_noted_and_the_second_interrupts_at_once():
    handler = SigtermHandler()
    interrupt()
    assert (handler.received, handler.signal) == (True, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    handler.remove()


@pytest.mark.usefixtures("pythons_own")
def test_leaving_after_a_ctrl_c_is_a_keyboard_interrupt():
    handler = SigtermHandler()
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        handler.leave()


def test_leaving_where_nothing_is_listened_to_is_what_another_process_heard():
    for number, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
        handler = SigtermHandler(listen=False)
        handler.note(number)
        assert handler.answer()
        with pytest.raises(error):
            handler.leave()


def test_a_handler_of_the_users_own_keeps_its_ctrl_c(earlier):
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    handler = SigtermHandler()
    interrupt()
    assert (heard, handler.received) == ([signal.SIGINT], False)
    terminate()
    assert handler.signal == signal.SIGTERM
    handler.remove()
    signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------ several runs


def test_several_runs_hear_one_signal_and_leave_when_all_have_answered(earlier):
    first, second = SigtermHandler(), SigtermHandler()
    terminate()
    assert (first.received, second.received, earlier) == (True, True, [])
    assert not first.answer()
    assert second.answer()
    for handler in (first, second):
        handler.remove()
    assert earlier == []


def test_one_that_answers_again_waits_for_the_others_no_longer(earlier):
    first, idle = SigtermHandler(), SigtermHandler()
    terminate()
    assert [first.answer(), first.answer()] == [False, True]
    for handler in (first, idle):
        handler.remove()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_runs_that_overlap_leave_the_handler_that_was_there(earlier, order):
    before = signal.getsignal(signal.SIGTERM)
    handlers = [SigtermHandler() for _ in range(3)]
    for index in order:
        handlers[index].remove()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_was_dropped_unclosed_keeps_no_signal(earlier):
    SigtermHandler()
    gc.collect()
    terminate()
    assert earlier == [signal.SIGTERM]


def test_what_has_come_to_another_process_of_the_group_has_come_to_all_runs_of_this_one(earlier):
    first, second = SigtermHandler(), SigtermHandler()
    first.note(signal.SIGINT)
    assert (first.signal, second.signal) == (signal.SIGINT, signal.SIGINT)
    assert not first.answer()
    for handler in (first, second):
        handler.remove()
