"""Small JSON files beside the members that can tell whether they are as they were written: sealed as a manifest is.

A digest finds damage and marks a file as one of ours; it does not say who has written it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store import atomic_write, read_regular, seal, unseal

LARGEST = 2**21  # bytes; results of thousands of members are smaller


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain JSON and its digest; the file before stays until the new one is on disk.

    Raises:
        StoreError: JSON cannot hold the values.
        OSError: it cannot be written.
    """
    data = seal(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what `write_sealed` was given.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptSnapshotError: it is not as it was written, or was never sealed.
        StoreError: it cannot be read.
    """
    try:
        return unseal(read_regular(path, limit=LARGEST, follow=True))
    except CorruptSnapshotError as error:
        raise CorruptSnapshotError(f"{path} is damaged: {error}, or move {path.parent} away") from error
    except (StoreError, FileNotFoundError):
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; choose another directory") from error
