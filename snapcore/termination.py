"""SIGTERM, noted in the handler and acted upon at the next update."""

import os
import signal
import threading
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


class Termination:
    """Note a SIGTERM until it is asked for; the handler that was there before is kept and put back.

    Only Python's main thread can handle signals: in any other thread nothing is installed. A second SIGTERM goes to
    the handler before, so that a loop that never comes back can still be ended.
    """

    def __init__(self) -> None:
        self.received = False
        self._process = os.getpid()
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._note)

    def remove(self) -> None:
        """Put the handler before back."""
        if self._installed and threading.current_thread() is threading.main_thread():
            self._installed = False
            # None stands for a handler that Python did not install, which it cannot put back either.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def leave(self) -> None:
        """Put the handler before back, let it have its turn, and exit with code 143.

        Raises:
            SystemExit: always.
        """
        before = self._before
        self.remove()
        if callable(before):
            before(signal.SIGTERM, None)
        raise SystemExit(EXIT_CODE)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        forked = os.getpid() != self._process  # a data loader's worker is to die of it as ever
        if self.received or forked:
            self.remove()
            signal.raise_signal(signal.SIGTERM)
        self.received = True
