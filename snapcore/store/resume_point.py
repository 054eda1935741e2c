"""The resume point: one file with all that a run needs to resume.

At the end of a cycle the weights are those of the member just taken, so the point refers to the member instead of
storing them again. A point contains a digest of its own content, and nothing in it is executable.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec

from snapcore.errors import StoreError
from snapcore.store.atomic import run_file, sweep
from snapcore.store.files import local_path, refuse_link
from snapcore.store.manifest import Count, Member, MemberCount
from snapcore.store.sealed import REFUSALS
from snapcore.store.tensor_file import as_bytes, host_arrays, open_tensors, refuse_foreign, write_tensors
from snapcore.store.tensors import Tensors

FOLDER = "resume"
FILE = "point.safetensors"
FORMAT = 1

_Word = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_WORDS = 624  # of a Mersenne twister, and the position among them


@dataclass(frozen=True)
class ResumePoint:
    """All that a run needs to resume.

    Arguments:
        tensors: named host arrays; at a cycle's end without the weights, which are in `member`'s file.
        state: plain JSON. `framework`: its name; `place`: the cursor's `state_dict()`; `values`: the backend's own, by
            name; `processes`: of each process the `random` states and the position in the `data`; `settings`: those in
            force, if there are any.
        member: the member taken at this step, or None in the middle of a cycle.
    """

    tensors: Tensors
    state: dict[str, Any]
    member: Member | None = None


class _Twister(msgspec.Struct):
    key: Annotated[list[_Word], msgspec.Meta(min_length=_WORDS, max_length=_WORDS)]
    pos: Annotated[int, msgspec.Meta(ge=0, le=_WORDS)]


class _NumpyRandom(msgspec.Struct):
    has_gauss: Annotated[int, msgspec.Meta(ge=0, le=1)]
    gauss: float
    state: _Twister


class _Random(msgspec.Struct):
    """Random states; what the framework makes of its own is not known here."""

    python: tuple[
        Literal[3], Annotated[list[_Word], msgspec.Meta(min_length=_WORDS + 1, max_length=_WORDS + 1)], float | None
    ]
    numpy: _NumpyRandom
    framework: Any

    def __post_init__(self) -> None:
        if self.python[1][-1] > _WORDS:
            raise ValueError(f"the position in Python's random state is 0..{_WORDS}, got {self.python[1][-1]}")


class _Data(msgspec.Struct):
    epoch: Count
    batches: Count
    random: _Random | None


class _Process(msgspec.Struct):
    random: _Random
    data: _Data


class _Place(msgspec.Struct):
    step: Count
    taken: MemberCount
    last: Count
    stopped: str | None


class _State(msgspec.Struct):
    framework: str
    place: _Place
    values: dict[str, Any]
    processes: Annotated[list[_Process], msgspec.Meta(min_length=1)]
    settings: dict[str, Any] = {}


class _Version(msgspec.Struct):
    format: int


class _Content(_Version):
    state: _State
    member: Member | None


def write_point(run: Path, point: ResumePoint, *, check: Callable[[], object]) -> None:
    """Replace the resume point of a run directory; the old one stays until the new one is on disk.

    Arguments:
        run: the absolute path of the directory, whose lock is held.
        point: what to write.
        check: called before the new one takes the old one's name; if it raises, the old one stays.

    Raises:
        StoreError: it cannot be written, or its state is not what `ResumePoint` says; the old one is unchanged.
    """
    path = run / FOLDER / FILE
    tensors = host_arrays(point.tensors)
    content = {"format": FORMAT, "state": point.state, "member": msgspec.to_builtins(point.member)}
    try:
        text = json.dumps(content, allow_nan=False)
        _parse(path, text)
    except REFUSALS as error:
        raise StoreError(
            f"a resume point's state must be plain JSON as ResumePoint says: {error}; return arrays among a dump's "
            "tensors, and no NaN"
        ) from error
    refuse_link(path.parent)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path} could not be written: {error.strerror or error}; move {FOLDER} away") from error
    refuse_foreign(path, lambda metadata: "snapcore" in metadata)
    with run_file(path, sum(array.nbytes for array in tensors.values()), check=check) as temporary:
        write_tensors(temporary, tensors, {"snapcore": text, "sha256": _digest(text, tensors)})


def read_point(run: str | os.PathLike[str]) -> ResumePoint | None:
    """Return the resume point of a run directory after checking it, or None if there is none.

    Raises:
        StoreError: it cannot be read, or another version of snapcore wrote it.
        CorruptSnapshotError: it is damaged.
    """
    path = local_path(run) / FOLDER / FILE
    refuse_link(path.parent)
    try:
        with open_tensors(path) as opened:
            tensors, _ = opened.read()
            text = opened.metadata.get("snapcore", "")
            if opened.metadata.get("sha256") != _digest(text, tensors):
                raise ValueError("it does not have the SHA-256 that was recorded")
            state, member = _parse(path, text)
            return ResumePoint(tensors, state, member)
    except (FileNotFoundError, NotADirectoryError):
        return None


def clear_point(run: Path) -> None:
    """Delete the resume point, which a finished run no longer needs, and its folder if nothing else is in it.

    Raises:
        StoreError: it cannot be deleted.
    """
    folder = run / FOLDER
    refuse_link(folder)
    try:
        if folder.is_dir():
            (folder / FILE).unlink(missing_ok=True)
            sweep(folder)
            if not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise StoreError(f"{folder / FILE} cannot be deleted: {error.strerror or error}") from error


def _parse(path: Path, text: str) -> tuple[dict[str, Any], Member | None]:
    content = json.loads(text, parse_constant=_refuse)
    version = msgspec.convert(content, _Version).format
    if version != FORMAT:
        raise StoreError(f"{path} has format {version}, this snapcore reads {FORMAT}; upgrade snapcore")
    member = msgspec.convert(content, _Content).member
    # The state is returned as it is: what the schema does not name is the backend's, and has any size and shape.
    return content["state"], member


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _digest(text: str, tensors: Tensors) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(as_bytes(array))
    return digest.hexdigest()
