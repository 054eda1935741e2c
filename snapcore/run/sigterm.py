"""SIGTERM and the first Ctrl-C: noted in the handler, answered at the next update.

A signal comes in the middle of an update, with half of the weights moved, so the handler only notes it. Each open run
of the process answers at its own next update, with a resume point; the process leaves when all have answered, or when
one that has answered comes again while others do nothing.
"""

import os
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM

Handler = Callable[[int, FrameType | None], Any] | int | None


class SigtermHandler:
    """Note a SIGTERM or a Ctrl-C until the run answers it; the handlers that were there before are kept and put back.

    Only Python's main thread can handle signals: in any other thread nothing is installed. A Ctrl-C is noted only where
    Python's own handler is in force, which raises KeyboardInterrupt; a handler of the user's own is left alone. A
    second signal goes to the handler before, so that a loop that never comes back can still be ended; so does one in a
    forked process, and one that comes by another handler when this one has been removed.

    Arguments:
        listen: whether to install anything at all.
    """

    def __init__(self, *, listen: bool = True) -> None:
        self.signal: int | None = None
        """The signal that has come, or None."""
        self.answered = False
        self._installed = listen and threading.current_thread() is threading.main_thread()
        self._listened = self._installed
        if self._installed:
            _PROCESS.add(self)

    @property
    def received(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def note(self, number: int) -> None:
        """Take a signal that has come to another process of the group as one that came to all runs of this one."""
        for each in {self, *_PROCESS.listeners}:
            each.signal = each.signal or number

    def answer(self) -> bool:
        """Answer the signal; return whether to leave now, or to wait for other runs of this process to answer."""
        again, self.answered = self.answered, True
        return again or not self._installed or all(each.answered for each in _PROCESS.listeners if each.received)

    def remove(self) -> None:
        """Listen no more. The last to be removed puts the handlers before back, unless others have taken over."""
        if self._installed and threading.current_thread() is threading.main_thread():
            self._installed = False
            _PROCESS.discard(self)

    def leave(self) -> None:
        """Listen no more, let the handler before have its turn, and exit as the signal would.

        Raises:
            SystemExit: with code 143, after a SIGTERM.
            KeyboardInterrupt: after a Ctrl-C.
        """
        number = self.signal or signal.SIGTERM
        before = _PROCESS.before.get(number) if self._listened else None
        self.remove()
        if callable(before):
            before(number, None)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_CODE)


class _Process:
    """The one handler of this process, and who listens to it."""

    def __init__(self) -> None:
        # Weak: a run that was dropped without being closed listens no more.
        self.listeners: weakref.WeakSet[SigtermHandler] = weakref.WeakSet()
        self.before: dict[int, Handler] = {}
        self._pid = os.getpid()

    def add(self, listener: SigtermHandler) -> None:
        self._pid = os.getpid()
        if signal.getsignal(signal.SIGTERM) != self._note:
            self.listeners.clear()  # another handler has taken over from those
        self.listeners.add(listener)
        for number in (signal.SIGTERM, signal.SIGINT):
            current = signal.getsignal(number)
            if current == self._note or (number == signal.SIGINT and current is not signal.default_int_handler):
                continue
            self.before[number] = signal.signal(number, self._note)

    def discard(self, listener: SigtermHandler) -> None:
        self.listeners.discard(listener)
        if not self.listeners:
            for number in self.before:
                self._put_back(number)

    def _put_back(self, number: int) -> Handler:
        before = self.before.get(number)  # kept: a handler that came later may still hand its signals on to this one
        if signal.getsignal(number) == self._note:
            # None stands for a handler that Python did not install, which it cannot put back either.
            signal.signal(number, signal.SIG_DFL if before is None else before)
        return before

    def _note(self, number: int, frame: FrameType | None) -> None:
        forked = os.getpid() != self._pid  # a data loader's worker is to die of it as ever
        new = [listener for listener in self.listeners if not listener.received]
        if not forked and not new and number == signal.SIGINT:
            for listener in self.listeners:  # the KeyboardInterrupt that comes now is the answer: none comes at close
                listener.signal = None if listener.signal == number else listener.signal
        if forked or not new:
            self._hand_on(number, frame)
        for listener in new:
            listener.signal = number

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        before = self._put_back(number)
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


_PROCESS = _Process()
