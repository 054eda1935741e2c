"""Paths and files that may be anyone's: what is opened is a regular file, and no link is followed out of a run."""

import os
import re
import stat
from io import BufferedReader
from pathlib import Path

from snapcore.errors import StoreError

# Two letters or more before the colon: one is a drive of Windows. One slash, since pathlib drops the second.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# The first is Windows' alone, the others are those of all other systems.
_BINARY, AT_ONCE, NO_LINK = (getattr(os, name, 0) for name in ("O_BINARY", "O_NONBLOCK", "O_NOFOLLOW"))


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a local directory, which a later `os.chdir` does not change.

    Raises:
        StoreError: it is a URL such as `gs://bucket/run`, or no path at all.

    Example:
        >>> local_path("runs/mine").is_absolute()
        True
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise StoreError(
            f"a run needs a local directory, got {text}; write to a local path and copy the run afterwards"
        )
    try:
        if "\0" in text:
            raise ValueError("a null character ends every name")
        os.fsencode(text)
        return Path(text).absolute()
    except ValueError as error:
        raise StoreError(f"{text} cannot be a path: {error}; choose another name") from error
    except OSError as error:
        raise StoreError(f"{text} is relative to a directory that is gone; give an absolute path") from error


def refuse_link(path: Path) -> None:
    """Raise `StoreError` if there is a link at `path`: it could lead to another's files."""
    try:
        link = path.is_symlink()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    if link:
        raise StoreError(f"{path} is a link, and a run is written only into files of its own; replace it by a copy")


def open_regular(path: Path, *, follow: bool = False) -> BufferedReader:
    """Open a file to read, and nothing but a file.

    Opening a named pipe would wait for its writer, and a device can hold anything and never end.

    Arguments:
        path: the file.
        follow: whether a link to a file will do.

    Raises:
        StoreError: there is a directory, link, pipe, socket or device at `path`.
        OSError: it cannot be opened.
    """
    if not follow:
        refuse_link(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise StoreError(f"{path} is not a regular file; move it away, or restore the file that was there")
    flags = os.O_RDONLY | _BINARY | AT_ONCE
    return os.fdopen(os.open(path, flags if follow else flags | NO_LINK), "rb")


def read_regular(path: Path, *, limit: int, follow: bool = False) -> bytes:
    """Return the content of a small file, such as a manifest.

    Raises:
        StoreError: it has more than `limit` bytes, or see `open_regular`.
        OSError: it cannot be read.
    """
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise StoreError(f"{path} has {size:,} bytes, and at most {limit:,} were expected; restore it")
        return file.read()
