"""A run directory is moved out of the way of a new run, never overwritten."""

import os
from pathlib import Path

from snapcore.errors import StoreError
from snapcore.store import atomic
from snapcore.store.files import local_path
from snapcore.store.lock import DirectoryLock
from snapcore.store.manifest import MANIFEST


def move_aside(path: str | os.PathLike[str]) -> Path:
    """Rename a run directory to the first free of `<name>.1`, `<name>.2`, … and return the new path.

    Raises:
        StoreError: it holds no run, a writer holds its lock, or it cannot be renamed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     run = Path(directory, "run")
        ...     run.mkdir()
        ...     _ = (run / "snapcore.json").write_text("{}")
        ...     move_aside(run).name
        'run.1'
    """
    source = local_path(path)
    _check_holds_a_run(source)
    # Under the lock, so that no writer is in it; and it is looked at again, since another process may have moved it.
    lock = DirectoryLock(source, create=False)
    try:
        _check_holds_a_run(source)
        if not atomic.POSIX:  # Windows renames no directory in which a file is open
            lock.release()
        number = 1
        while os.path.lexists(target := source.with_name(f"{source.name}.{number}")):
            number += 1
        try:
            return source.rename(target)
        except OSError as error:
            raise StoreError(f"{source} cannot be renamed to {target.name}: {error}") from error
    finally:
        lock.release()


def _check_holds_a_run(directory: Path) -> None:
    if not os.path.lexists(directory / MANIFEST):
        raise StoreError(f"{directory} holds no run: there is no {MANIFEST}; move it yourself if you mean it")
