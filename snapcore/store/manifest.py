"""The manifest of a run directory, `snapcore.json`: the members, the program, and why the run stopped.

It is checked before it is used. A reader gets the members that were written or an error that names the file: no field
is guessed, ignored or filled in, and no file name leads out of the directory.
"""

import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store.files import read_regular
from snapcore.store.sealed import REFUSALS, seal, unseal

MANIFEST = "snapcore.json"
FORMAT = 1
_LONGEST = 16 * 2**20
"""Bytes that a manifest may have: enough for some 40,000 members."""
_DEEPEST = 100
"""Levels that a program may have, which is copied by recursion; our own have three."""

# Bounds that no training reaches, so that a forged number can be used as a count or a length.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
MemberCount = Annotated[int, msgspec.Meta(ge=0, le=10**6)]
_Index = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


def file_name(index: int) -> str:
    """Return the name of a member's file."""
    return f"snapshot-{index:03d}.safetensors"


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member of the ensemble, as the manifest lists it.

    Attributes:
        index: its number, from 1.
        file: the name of its safetensors file in the run directory.
        sha256: that file's SHA-256, 64 hexadecimal digits.
        step: optimizer updates done when it was taken.
        due: the step at which it was due; equal to `step` unless it was taken late.
        cycle: the cycle that it ends, from 0.
        lr: the rate of the last update done.
        framework: the framework that wrote it, such as `torch`.
        unfinished: whether training ended before its cycle did.
        metrics: finite numbers recorded with it, by name, or None.

    Raises:
        ValueError: `file` is not the name of that member's file, or `lr` or a metric is not finite.

    Example:
        >>> Member(1, "snapshot-001.safetensors", "0" * 64, step=12, due=12, cycle=0, lr=0.01, framework="torch").step
        12
    """

    index: _Index
    file: str
    sha256: _Digest
    step: Count
    due: Count
    cycle: Count
    lr: float
    framework: str
    unfinished: bool = False
    metrics: dict[str, float] | None = None

    def __post_init__(self) -> None:
        # No other name: what a manifest names may be deleted, so it must not name another's file.
        if self.file != file_name(self.index):
            raise ValueError(f"file must be {file_name(self.index)}, got {self.file!r}")
        for name, value in {"lr": self.lr, **(self.metrics or {})}.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")


def new_member(
    *,
    index: int,
    step: int,
    cycle: int,
    lr: float,
    framework: str,
    due: int | None = None,
    unfinished: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> Member:
    """Return a member that is yet to be written, for `SnapshotStore.put`; Python's and NumPy's numbers will do.

    Arguments:
        index: its number, from 1; one that the run does not have yet.
        step: optimizer updates done.
        cycle: the cycle that it ends, from 0.
        lr: the rate of the last update done.
        framework: the framework that writes it, such as `torch`.
        due: the step at which it was due; None means `step`.
        unfinished: whether training ended before its cycle did.
        metrics: finite numbers to record with it, by name.

    Raises:
        StoreError: a value is of the wrong type or out of range.

    Example:
        >>> new_member(index=1, step=12, cycle=0, lr=0.01, framework="torch").file
        'snapshot-001.safetensors'
    """
    try:
        member = Member(
            index=operator.index(index),
            file=file_name(operator.index(index)),
            sha256="0" * 64,  # until the file is written
            step=operator.index(step),
            due=operator.index(step if due is None else due),
            cycle=operator.index(cycle),
            lr=float(lr),
            framework=framework,
            unfinished=unfinished,
            metrics=None if metrics is None else {name: float(value) for name, value in dict(metrics).items()},
        )
        # msgspec checks types and ranges when it decodes, not when an object is made.
        return msgspec.json.decode(msgspec.json.encode(member), type=Member)
    except REFUSALS as error:
        raise StoreError(f"a member must have plain numbers in range: {error}; correct the value") from error


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of `snapcore.json` but its seal: the program, why the run stopped, and the members by index."""

    format: int = FORMAT
    program: dict[str, Any] | None = None
    stopped: str | None = None
    members: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        indexes = [member.index for member in self.members]
        if len(indexes) != len(set(indexes)):
            raise ValueError(f"each member needs its own index, got {indexes}")

    def with_member(self, member: Member) -> "Manifest":
        """Return the manifest with one more member, in the order of their indexes."""
        members = sorted((*self.members, member), key=lambda each: each.index)
        return msgspec.structs.replace(self, members=tuple(members))


def _depth(value: Any) -> int:
    """Return how many lists and objects are within each other."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth, level = (
            depth + 1,
            [item for each in level for item in (each.values() if isinstance(each, dict) else each)],
        )
    return depth


class _Version(msgspec.Struct):
    format: int


def read_manifest(directory: Path, *, follow: bool = False) -> Manifest:
    """Read and check a run directory's manifest.

    Arguments:
        directory: the run's.
        follow: whether a link to a manifest will do.

    Raises:
        StoreError: there is none, it cannot be read, or another version of snapcore wrote it.
        CorruptSnapshotError: it is damaged.
    """
    path = directory / MANIFEST
    try:
        data = read_regular(path, limit=_LONGEST, follow=follow)
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise StoreError(f"{directory} holds no run: there is no {MANIFEST}; check the path") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        # The format comes first: a later one may have fields that this version would call errors.
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT:
            raise StoreError(f"{path} has format {version}, this snapcore reads format {FORMAT}; upgrade snapcore")
        # A seal only shows that nothing was altered by accident, so the content is checked as well.
        return _to_manifest(unseal(data))
    except (*REFUSALS, CorruptSnapshotError) as error:
        raise CorruptSnapshotError(f"{path} is not a manifest that snapcore writes: {error}; restore it") from error


def format_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as the sealed JSON that `read_manifest` accepts.

    Raises:
        StoreError: it holds something that would be refused when read.
    """
    data = seal(msgspec.to_builtins(manifest))
    try:
        _to_manifest(unseal(data))
        if len(data) > _LONGEST:
            raise ValueError(f"{len(data):,} bytes are more than {_LONGEST:,}")
    except REFUSALS as error:
        raise StoreError(f"a manifest must be what {MANIFEST} can hold: {error}; pass plain values") from error
    return data


def _to_manifest(content: dict[str, Any]) -> Manifest:
    if _depth(content.get("program")) > _DEEPEST:
        raise ValueError(f"a program has at most {_DEEPEST} levels of lists and objects")
    # By way of JSON, since msgspec decodes that more strictly than it converts Python's values.
    manifest = msgspec.json.decode(msgspec.json.encode(content), type=Manifest)
    return msgspec.structs.replace(manifest, members=tuple(sorted(manifest.members, key=lambda each: each.index)))


def entry(member: Member) -> str:
    """Return the part of a member's manifest entry that its own file repeats: all but the SHA-256, as JSON."""
    return msgspec.json.encode(_without_digest(member)).decode()


def describes(text: str, member: Member) -> bool:
    """Return whether `text`, found in a file, is the entry of `member`."""
    return bool(_entry(text) == _without_digest(member))


def has_index(text: str, index: int) -> bool:
    """Return whether `text`, found in a file, is an entry of a member with this index."""
    found = _entry(text)
    return isinstance(found, dict) and found.get("index") == index


def _entry(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except REFUSALS:
        return None


def _without_digest(member: Member) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(member)
    del fields["sha256"]
    return fields
