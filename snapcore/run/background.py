"""One background thread that turns a pending capture into a file while training continues.

At most one job runs and one waits, so at most two copies of the weights exist, however slow the disk.
A job that fails stops neither the thread nor the loop: its own exception is raised in the loop's
thread, at the next `check`.

After a fork the child has no such thread: there `submit` is refused, and `drain` and `close` have
nothing to wait for, so a forked data loader neither hangs nor writes its parent's files.
"""

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from snapcore.errors import ProtocolError

_FAILED: list[int] = []
"""Processes in which a job of a writer that nobody closed has failed."""


@atexit.register  # before any writer, so it comes after all of them
def _exit_as_failed() -> None:
    """End with status 1 a program whose last member is not on disk: its caller must not take it for done."""
    if os.getpid() in _FAILED:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class SnapshotWriter:
    """Run jobs one after the other in a daemon thread, until closed or until the interpreter exits.

    Arguments:
        at_end: called in the same thread after the last job, such as what frees a lock that the jobs rely on.

    Example:
        >>> done = []
        >>> with SnapshotWriter() as writer:
        ...     writer.reserve()                    # wait for room, and only then copy the weights
        ...     writer.submit(lambda: done.append(1))
        ...     writer.check()                      # raises what an earlier job raised
        >>> done
        [1]
    """

    def __init__(self, *, at_end: Callable[[], None] | None = None) -> None:
        self._at_end = at_end
        self._changed = threading.Condition()
        self._waiting: Callable[[], None] | None = None
        self._busy = self._closed = self._ended = False
        self._error: BaseException | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="snapcore-writer", daemon=True)
        self._thread.start()
        # A thread that is no daemon would keep a crashed program alive; a daemon dies with the interpreter, and its
        # jobs with it. So it is one, and is waited for at exit.
        atexit.register(self._close_at_exit)

    def reserve(self) -> None:
        """Wait until a job may be submitted, so that its copy is made only when there is room.

        Raises:
            ProtocolError: the writer is closed, or another process made it.
        """
        self._check_usable()
        with self._changed:
            self._wait_for_room()

    def submit(self, job: Callable[[], None]) -> None:
        """Hand over a job; waits for room if `reserve` has not.

        Arguments:
            job: called once, without arguments, in the writer's thread; forgotten when it is done.

        Raises:
            ProtocolError: the writer is closed, or another process made it.
        """
        self._check_usable()
        with self._changed:
            self._wait_for_room()
            self._waiting = job
            self._changed.notify_all()

    def check(self) -> None:
        """Raise, once, what an earlier job raised; costs next to nothing while none has.

        Raises:
            BaseException: the very object that the first failed job raised, with a note for each
                that failed after it.
        """
        if self._error is not None:
            self._raise()

    def drain(self) -> None:
        """Wait until all that was submitted is done, then `check`."""
        if self._is_owner():
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is None and not self._busy)
        self.check()

    def close(self) -> None:
        """Finish what was submitted, stop the thread, then `check`. Closing twice is closing once."""
        if self._is_owner():
            with self._changed:
                self._closed = True
                self._changed.notify_all()
                # Not `join`: a Ctrl-C in it has Python take the thread for ended while it still writes.
                self._changed.wait_for(lambda: self._ended)
        atexit.unregister(self._close_at_exit)
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except BaseException:
            _FAILED.append(os.getpid())
            raise  # which prints it, and leaves the program's exit status as it was

    def _is_owner(self) -> bool:
        return os.getpid() == self._process

    def _check_usable(self) -> None:
        # Before the lock is touched: a fork may have copied it locked, with nobody left to open it.
        if not self._is_owner():
            raise ProtocolError(f"this writer belongs to process {self._process}; make one in this process")

    def _wait_for_room(self) -> None:
        self._changed.wait_for(lambda: self._closed or self._waiting is None)
        if self._closed:
            raise ProtocolError("this writer is closed; nothing can be submitted to it any more")

    def _raise(self) -> None:
        if not self._is_owner():  # the parent raises it
            return
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while self._do_next():
            pass
        if self._at_end is not None:
            self._attempt(self._at_end)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _do_next(self) -> bool:
        """Do one job, once there is one; False when there will be none. Nothing of it is kept here."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting is not None)
            job, self._waiting = self._waiting, None
            self._busy = job is not None
            self._changed.notify_all()
        if job is None:
            return False
        self._attempt(job)
        del job  # before anyone hears that it is done: it holds a copy of the weights
        with self._changed:
            self._busy = False
            self._changed.notify_all()
        return True

    def _attempt(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001  whatever it is, it is raised in the loop's thread
            with self._changed:
                if self._error is None:
                    self._error = error
                else:
                    # As text: an exception holds its frames, and they the weights; one such copy is enough.
                    self._error.add_note(f"a later job failed too: {error!r}")
