"""Files that somebody else may have put there, and a directory that somebody else may take away."""

import errno
import os
import stat
import weakref
from pathlib import Path
from typing import BinaryIO

from snapcore.errors import StoreError


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read, and nothing else: a FIFO may never answer, and a device never ends.

    Raises:
        OSError: it is no regular file, nor a link to one, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


class HeldDirectory:
    """A run's directory, to be looked at before a file beside the members is written.

    Somebody may move or delete it while the run trains, and begin another at its name, whose files are not this run's
    to write. The store looks for itself before it writes members, resume points and the manifest.

    Arguments:
        path: the directory, which exists.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, None
        # Kept open, or a directory that is made once this one is deleted could have its number. Windows opens none, and
        # lets none be renamed in which a file is open, such as the store's lock.
        if os.name == "posix":
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)

    @property
    def is_there(self) -> bool:
        """Whether its path still leads to it."""
        try:
            return self._descriptor is None or os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except OSError:  # there is nothing at its path
            return False

    def check(self) -> None:
        """Raise `StoreError` unless its path still leads to it."""
        if not self.is_there:
            raise StoreError(f"{self._path} was moved, deleted or replaced while this run had it open; start again")
