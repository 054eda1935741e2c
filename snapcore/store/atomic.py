"""How a file reaches the disk: whole or not at all, and flushed.

A file is written beside its final name, flushed to disk and renamed, so that a reader sees the old
file or the new one and a killed writer leaves nothing but a temporary file, which the next writer
sweeps away. Nothing here knows what a run is.
"""

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POSIX = os.name == "posix"
_TEMPORARY = ".tmp"  # safetensors' own temporary files begin so too, and one sweep finds both


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path to write; flush it and rename it to `target`, or leave no trace on an error.

    The file gets the mode that an ordinary `open` would give it, whatever the one who writes it sets.

    Raises:
        OSError: the file could not be created, flushed or renamed; `target` is as it was.
    """
    temporary = target.with_name(f"{_TEMPORARY}-{target.name}-{secrets.token_hex(4)}")
    try:
        mode = _create(temporary)
        yield temporary
        _flush(temporary, mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_directory(target.parent)


def _create(path: Path) -> int:
    """Create an empty file and tell the mode that the umask leaves it (reading the umask means setting it)."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _flush(path: Path, mode: int) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    if stat.S_IMODE(path.stat().st_mode) != mode:  # some network file systems refuse any chmod
        path.chmod(mode)


def _flush_directory(path: Path) -> None:
    if not POSIX:  # Windows cannot open a directory, and needs no such flush
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(directory: Path) -> None:
    """Delete the temporary files that killed writers left; only for who holds the directory's lock.

    Raises:
        OSError: one could not be deleted.
    """
    for path in directory.glob(f"{_TEMPORARY}*"):
        if path.is_symlink() or path.is_file():
            path.unlink()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
