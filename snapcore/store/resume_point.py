"""The resume point: one file with all that a run needs to resume.

At the end of a cycle the weights are those of the member just taken, so the point refers to the member instead of
storing them again. A point contains a digest of its own content, and nothing in it is executable.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store import atomic
from snapcore.store.manifest import Member
from snapcore.store.tensors import Tensors, map_tensors, read_metadata, row_major

FOLDER = "resume"
FILE = "point.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class ResumePoint:
    """All that a run needs to resume.

    Arguments:
        tensors: named host arrays; at a cycle's end without the weights, which are in `member`'s file.
        state: plain JSON: the cursor's position, the backend's values, random states and the position in the data.
        member: the member taken at this step, or None in the middle of a cycle.
    """

    tensors: Tensors
    state: dict[str, Any]
    member: Member | None = None


def write_point(run: Path, point: ResumePoint) -> None:
    """Replace the resume point of a run directory; the old one stays until the new one is on disk.

    Raises:
        StoreError: it cannot be written, or its state is not plain JSON; the old one is unchanged.
    """
    path = run / FOLDER / FILE
    tensors = row_major(point.tensors) if point.tensors else {}
    content = {"format": FORMAT, "state": point.state, "member": msgspec.to_builtins(point.member)}
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"a resume point's state must be plain JSON: {error}; return arrays among a dump's tensors, and no NaN"
        ) from error
    metadata = {"snapcore": text, "sha256": _digest(text, tensors)}
    try:
        path.parent.mkdir(exist_ok=True)
        atomic.sweep(path.parent)
        with atomic.atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        size = sum(array.nbytes for array in tensors.values())
        raise StoreError(
            f"{path} could not be written, which needs {size} bytes: {error}; make room, then start again to resume "
            "from the point before"
        ) from error


def read_point(run: Path) -> ResumePoint | None:
    """Return the resume point of a run directory after checking it, or None if there is none.

    Raises:
        StoreError: it cannot be read, or another version of snapcore wrote it.
        CorruptSnapshotError: it is damaged.
    """
    path = run / FOLDER / FILE
    if not path.exists():
        return None
    try:
        metadata = read_metadata(path)
        tensors = {name: array.copy() for name, array in map_tensors(path).items()}
        text = metadata["snapcore"]
        if metadata["sha256"] != _digest(text, tensors):
            raise ValueError("it does not have the SHA-256 that was recorded")
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise StoreError(f"{path} has format {content['format']}, this snapcore reads {FORMAT}; upgrade snapcore")
        member = msgspec.convert(content["member"], Member | None)
        return ResumePoint(tensors, content["state"], member)
    except OSError as error:
        raise error if isinstance(error, StoreError) else StoreError(f"{path} cannot be read: {error}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise CorruptSnapshotError(
            f"{path} is not what was written: {error}; restore it, or start anew in another directory"
        ) from error


def clear_point(run: Path) -> None:
    """Delete the resume point, which a finished run no longer needs.

    Raises:
        StoreError: it cannot be deleted.
    """
    try:
        if (run / FOLDER).exists():
            shutil.rmtree(run / FOLDER)
    except OSError as error:
        raise StoreError(f"{run / FOLDER} cannot be deleted: {error}") from error


def _digest(text: str, tensors: Tensors) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
