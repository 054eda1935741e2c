"""SIGTERM, noted in the handler and answered at the next update."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM

Handler = Callable[[int, FrameType | None], Any] | int | None


class SigtermHandler:
    """Note a SIGTERM until it is asked for; the handler that was there before is kept and put back.

    Only Python's main thread can handle signals: in any other thread nothing is installed. A second SIGTERM goes to
    the handler before, so that a loop that never comes back can still be ended; so does one in a forked process, and
    one that comes here by another handler when this one has been removed.

    Arguments:
        listen: whether to install anything at all.
    """

    def __init__(self, *, listen: bool = True) -> None:
        self.received = False
        self._process = os.getpid()
        self._before: Handler = None
        self._installed = listen and threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._note)

    def remove(self) -> None:
        """Put the handler before back, unless another has taken this one's place."""
        if self._installed and threading.current_thread() is threading.main_thread():
            self._installed = False
            if signal.getsignal(signal.SIGTERM) == self._note:
                # None stands for a handler that Python did not install, which it cannot put back either.
                signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def leave(self) -> None:
        """Put the handler before back, let it have its turn, and exit with code 143.

        Raises:
            SystemExit: always.
        """
        self.remove()
        if callable(self._before):
            self._before(signal.SIGTERM, None)
        raise SystemExit(EXIT_CODE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        forked = os.getpid() != self._process  # a data loader's worker is to die of it as ever
        if self.received or forked or not self._installed:
            self._hand_on(number, frame)
        self.received = True

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.remove()
        if callable(self._before):
            self._before(number, frame)
        elif self._before != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
