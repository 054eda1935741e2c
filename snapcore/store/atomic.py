"""Write files whole or not at all.

A reader sees the old file or the new one, never half of one, whenever the writer is killed or the machine loses power.
"""

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POSIX = os.name == "posix"
_TEMPORARY = ".tmp"  # safetensors' own temporary files start with it too, so one sweep finds both


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it is flushed and renamed to `target`, on an error it is deleted.

    The file gets the mode that `open` would have given it, whatever mode its writer sets.

    Raises:
        OSError: the file cannot be created, flushed or renamed; `target` is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with atomic_write(Path(directory, "notes.txt")) as temporary:
        ...         _ = temporary.write_text("whole")
        ...     Path(directory, "notes.txt").read_text()
        'whole'
    """
    # In the same directory, since a rename is atomic only within one file system.
    temporary = target.with_name(f"{_TEMPORARY}-{target.name}-{secrets.token_hex(4)}")
    try:
        # The umask can only be read by setting it, for all threads. A file created here shows what it leaves.
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield temporary
        # Flushed before the rename: otherwise the name could reach the disk first, and after a power loss it would
        # belong to a file without content.
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # only then: some network file systems refuse any chmod
            temporary.chmod(mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    # The rename is a change of the directory, and lost with it: whatever is written next must not reach the disk first.
    _flush_directory(target.parent)


def _flush_directory(path: Path) -> None:
    if not POSIX:  # Windows cannot open a directory, and needs no such flush
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(directory: Path) -> None:
    """Delete the temporary files of killed writers; only the holder of the directory's lock may call this.

    Raises:
        OSError: one cannot be deleted.
    """
    for path in directory.glob(f"{_TEMPORARY}*"):
        if path.is_symlink() or path.is_file():
            path.unlink()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
