"""The manifest of a run directory, `snapcore.json`: the members, the program, and why the run stopped.

It is checked before it is used. A reader gets the members that were written or an error that names the file: no field
is guessed, ignored or filled in, and no file name leads out of the directory.
"""

import hashlib
import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

import msgspec

from snapcore.errors import CorruptSnapshotError, StoreError

MANIFEST = "snapcore.json"
FORMAT = 1

# What converting JSON, text and numbers raises; msgspec's errors are ValueErrors.
_REFUSALS = (TypeError, ValueError, OverflowError, RecursionError)

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Index = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


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
        ValueError: `file` is not a plain file name, or `lr` or a metric is not finite.

    Example:
        >>> Member(1, "snapshot-001.safetensors", "0" * 64, step=12, due=12, cycle=0, lr=0.01, framework="torch").step
        12
    """

    index: _Index
    file: str
    sha256: _Digest
    step: _Count
    due: _Count
    cycle: _Count
    lr: float
    framework: str
    unfinished: bool = False
    metrics: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if not _is_plain_name(self.file):
            raise ValueError(f"file must be a plain name inside the directory, got {self.file!r}")
        for name, value in {"lr": self.lr, **(self.metrics or {})}.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")


def _is_plain_name(name: str) -> bool:
    """Return whether every system takes the name for a file in the directory itself."""
    names = {PurePosixPath(name).name, PureWindowsPath(name).name}
    return names == {name} and name not in ("", "..", MANIFEST) and "\0" not in name


def file_name(index: int) -> str:
    """Return the name of a member's file."""
    return f"snapshot-{index:03d}.safetensors"


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
    except _REFUSALS as error:
        raise StoreError(f"a member must have plain numbers in range: {error}; correct the value") from error


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of `snapcore.json`: the program, why the run stopped, the members by index, and its own SHA-256."""

    format: int = FORMAT
    program: dict[str, Any] | None = None
    stopped: str | None = None
    members: tuple[Member, ...] = ()
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("index", "file"):
            values = [getattr(member, name) for member in self.members]
            if len(values) != len(set(values)):
                raise ValueError(f"each member needs its own {name}, got {values}")

    def with_member(self, member: Member) -> "Manifest":
        """Return the manifest with one more member, in the order of their indexes."""
        members = sorted((*self.members, member), key=lambda each: each.index)
        return msgspec.structs.replace(self, members=tuple(members))


class _Version(msgspec.Struct):
    format: int


def read_manifest(directory: Path) -> Manifest:
    """Read and check a run directory's manifest.

    Raises:
        StoreError: there is none, it cannot be read, or another version of snapcore wrote it.
        CorruptSnapshotError: it is damaged.
    """
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"{directory} holds no run: there is no {MANIFEST}; check the path") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    try:
        # The format comes first: a later one may have fields that this version would call errors.
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT:
            raise StoreError(f"{path} has format {version}, this snapcore reads format {FORMAT}; upgrade snapcore")
        manifest = msgspec.json.decode(data, type=Manifest)
    except _REFUSALS as error:
        raise CorruptSnapshotError(f"{path} is not a manifest that snapcore writes: {error}; restore it") from error
    members = sorted(manifest.members, key=lambda each: each.index)
    return msgspec.structs.replace(manifest, members=tuple(members))


def format_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as indented JSON that `read_manifest` accepts.

    Raises:
        StoreError: it holds something that would be refused when read.
    """
    try:
        data = msgspec.json.encode(sealed(manifest))
        msgspec.json.decode(data, type=Manifest)
    except _REFUSALS as error:
        raise StoreError(f"a manifest must be what {MANIFEST} can hold: {error}; pass plain values") from error
    return msgspec.json.format(data, indent=2) + b"\n"


def sealed(manifest: Manifest) -> Manifest:
    """Return the manifest with its SHA-256."""
    return msgspec.structs.replace(manifest, sha256=_digest(manifest))


def is_sealed(manifest: Manifest) -> bool:
    """Return whether a manifest has the SHA-256 of its content, or none."""
    return manifest.sha256 in ("", _digest(manifest))


def _digest(manifest: Manifest) -> str:
    """Return the SHA-256 of all other fields; white space does not count."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, sha256=""))).hexdigest()


def plain(program: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `program` as JSON gives it back.

    Raises:
        StoreError: it holds something that JSON cannot represent, such as an array or NaN.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(program, allow_nan=False))
    except _REFUSALS as error:
        raise StoreError(f"program must be plain JSON: {error}; pass a program's to_dict()") from error
    return copy


def entry(member: Member) -> str:
    """Return the part of a member's manifest entry that its own file repeats: all but the SHA-256, as JSON."""
    return msgspec.json.encode(_without_digest(member)).decode()


def describes(text: str, member: Member) -> bool:
    """Return whether `text`, found in a file, is the entry of `member`."""
    try:
        return bool(msgspec.json.decode(text) == _without_digest(member))
    except _REFUSALS:
        return False


def _without_digest(member: Member) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(member)
    del fields["sha256"]
    return fields
