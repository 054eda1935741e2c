"""The lock of a run directory, and whether the directory is still the one that was locked."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor, unlock_descriptor

from snapcore.errors import StoreError
from snapcore.store.files import AT_ONCE, NO_LINK, refuse_link

Identity = tuple[int, int]


class DirectoryLock:
    """Hold a directory for one writer.

    The lock is the operating system's, not the existence of a file: it is free as soon as its process is dead, however
    it died. It belongs to the file that was opened, not to a name: when the directory is renamed the lock goes with it,
    and another run can lock another directory at the old path. So every write calls `check` first.

    Arguments:
        directory: what to hold.
        create: whether to create it, with its parents.

    Raises:
        StoreError: another run holds it, it cannot be written, or its lock file is not a regular file.
    """

    def __init__(self, directory: Path, *, create: bool = True) -> None:
        self._directory, self._file, self._process = directory, directory / ".lock", os.getpid()
        with _naming(directory):
            if create:
                directory.mkdir(parents=True, exist_ok=True)
            refuse_link(self._file)
            if self._file.exists() and not self._file.is_file():
                raise StoreError(f"{self._file} is not a regular file; move it away")
            self._at = _identity(directory.stat())
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | AT_ONCE | NO_LINK, 0o666)
        self._held = _identity(os.fstat(self._descriptor))
        self._release = weakref.finalize(self, _release, self._descriptor, self._held, self._process)
        self._release.atexit = False  # the system frees it, once the writer's thread has been waited for
        try:
            with _naming(directory):
                locked = lock_descriptor(self._descriptor, blocking=False)
            if not locked:
                raise StoreError(f"{directory} is being written by another run; wait for it, or choose another")
            self.check()  # another process may have renamed the directory between the open and the lock
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """Make sure that this process holds the directory, and that its path still leads to it.

        Raises:
            StoreError: it was freed, belongs to another process, or was moved, deleted or replaced.
        """
        self.check_process()
        if not self._release.alive:
            raise StoreError(f"{self._directory} is closed; open it with mode='w' to write")
        try:
            found = (os.fstat(self._descriptor), self._file.lstat(), self._directory.stat())
            same = tuple(map(_identity, found)) == (self._held, self._held, self._at)
        except OSError:  # one of the three is gone
            same = False
        if not same:
            raise StoreError(
                f"{self._directory} was moved, deleted or replaced while this run had it open; start again"
            )

    @property
    def is_ours(self) -> bool:
        """Whether this process made it, and not one that was forked into this."""
        return os.getpid() == self._process

    def check_process(self) -> None:
        """Raise `StoreError` in a process that was forked from the one that holds the directory."""
        if not self.is_ours:
            raise StoreError(f"{self._directory} was opened by process {self._process}; open it in this one to write")

    def release(self) -> None:
        """Free the directory; more than once is allowed."""
        self._release()


def _release(descriptor: int, held: Identity, process: int) -> None:
    try:
        ours = _identity(os.fstat(descriptor)) == held
    except OSError:
        ours = False
    if not ours:  # someone has closed it, such as a daemon that closes all; the number may be another file's now
        return
    if os.getpid() == process:
        # Closing is not enough while a forked child has a copy. The child in turn must not unlock: both share one lock.
        unlock_descriptor(descriptor)
    os.close(descriptor)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


@contextmanager
def _naming(directory: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{directory} cannot be written: {error.strerror or error}; choose another directory"
        ) from error
