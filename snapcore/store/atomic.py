"""Write files whole or not at all.

A reader sees the old file or the new one, never half of one, whenever the writer is killed or the machine loses power.
"""

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from snapcore.errors import StoreError
from snapcore.store.files import refuse_link

POSIX = os.name == "posix"

# What a run directory's temporary files are called, the application's among them. Nobody else's file has such a name,
# so that a sweep deletes what killed writers of ours have left, and nothing more.
_TEMPORARY = re.compile(
    r"\.tmp-(snapcore\.json|snapshot-\d{3,}\.safetensors|point\.safetensors|job\.json|history\.csv|results\.json"
    r"|training\.png|recipe\.json|(test|held-out)\.safetensors)-[0-9a-f]{8}"
)
# Some network and user-space file systems cannot flush a directory, and say so with one of these.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_write(target: Path, *, before_rename: Callable[[], object] | None = None) -> Iterator[Path]:
    """Yield a temporary path to write; on success it is flushed and renamed to `target`, on an error it is deleted.

    Arguments:
        target: the file to create or replace.
        before_rename: called once all is on disk but the name; if it raises, `target` is unchanged.

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
    temporary = target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        # Flushed before the rename: otherwise the name could reach the disk first, and after a power loss it would
        # belong to a file without content.
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
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
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def sweep(directory: Path) -> None:
    """Delete the temporary files of killed writers; only the holder of the run's lock may call this.

    Raises:
        OSError: one cannot be deleted.
    """
    kept = directory / "predictions"
    for path in (*directory.glob(".tmp-*"), *([] if kept.is_symlink() else kept.glob(".tmp-*"))):
        if _TEMPORARY.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()


@contextmanager
def run_file(path: Path, size: int, *, check: Callable[[], object]) -> Iterator[Path]:
    """Write a file of a run: `atomic_write`, but over no link, and with errors that say what could not be written.

    Arguments:
        path: the file to create or replace.
        size: bytes that it needs, about.
        check: makes sure that the directory is held, and raises if it is not.

    Raises:
        StoreError: it could not be written; what was there is unchanged.
    """
    refuse_link(path)
    try:
        with atomic_write(path, before_rename=check) as temporary:
            yield temporary
    except StoreError:
        raise
    except OSError as error:
        check()  # a directory that has gone is the cause, and what there is to say
        advice = "make room, then start again" if error.errno in _FULL else "what was there before is unchanged"
        reason = error.strerror or error
        raise StoreError(f"{path} could not be written, which needs {size} bytes: {reason}; {advice}") from error
