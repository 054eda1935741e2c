"""Small JSON files that can tell whether they are as they were written.

Each holds, as `sha256`, the digest of all else in it: of the JSON with sorted keys and no spaces. A digest finds
damage and marks a file as one of ours; it does not say who has written it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.lab.files import read_at_most
from snapcore.store import atomic_write

SEAL = "sha256"
LARGEST = 2**21  # bytes; results of thousands of members are smaller


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain JSON and its digest; the file before stays until the new one is on disk.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps({**values, SEAL: _digest(values)}, indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode() + b"\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what `write_sealed` was given.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptSnapshotError: it is not as it was written, or was never sealed.
        StoreError: it cannot be read.
    """
    try:
        values = json.loads(read_at_most(path, LARGEST), parse_constant=_refuse)
        if not isinstance(values, dict) or values.pop(SEAL, None) != _digest(values):
            raise ValueError("it does not have the SHA-256 of its content")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; choose another directory") from error
    except (ValueError, RecursionError) as error:
        raise CorruptSnapshotError(f"{path} is damaged: {error}; restore it, or move {path.parent} away") from error
    return values


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
