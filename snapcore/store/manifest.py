"""What a run directory says about itself: the members and the program, as `snapcore.json`.

The file is checked before it is believed. A reader meets either the members that were written or an
error naming the file: no field is guessed, ignored or filled in, and no name leads out of the directory.
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

# What JSON, text and numbers raise when they are not what they should be; msgspec's errors are ValueErrors.
_REFUSALS = (TypeError, ValueError, OverflowError, RecursionError)

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Index = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Describe one snapshot as its run's manifest does.

    Attributes:
        index: its number, from 1.
        file: the name of its safetensors file inside the run's directory.
        sha256: that file's SHA-256, 64 hexadecimal digits.
        step: optimizer updates done when it was taken.
        due: the step at which it was due; equal to `step` unless it was taken late.
        cycle: the cycle it closes, from 0.
        lr: the rate of the last update done.
        framework: who wrote it, such as `torch`.
        unfinished: whether its cycle was cut short.
        metrics: numbers the user added, by name, or None.

    Raises:
        ValueError: `file` is no plain file name, or `lr` or a metric is not finite.

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
    """Tell whether no system reads the name as leading anywhere but into the directory itself."""
    names = {PurePosixPath(name).name, PureWindowsPath(name).name}
    return names == {name} and name not in ("", "..", MANIFEST) and "\0" not in name


def new_member(
    *,
    index: int,
    step: int,
    due: int,
    cycle: int,
    lr: float,
    framework: str,
    unfinished: bool,
    metrics: Mapping[str, float] | None,
) -> Member:
    """Return a member that has no digest yet, from Python's or NumPy's numbers, checked as one that is read.

    Raises:
        StoreError: a value is of the wrong type or out of range.
    """
    try:
        member = Member(
            index=operator.index(index),
            file=f"snapshot-{operator.index(index):03d}.safetensors",
            sha256="0" * 64,
            step=operator.index(step),
            due=operator.index(due),
            cycle=operator.index(cycle),
            lr=float(lr),
            framework=framework,
            unfinished=unfinished,
            metrics=None if metrics is None else {name: float(value) for name, value in dict(metrics).items()},
        )
        return msgspec.json.decode(msgspec.json.encode(member), type=Member)
    except _REFUSALS as error:
        raise StoreError(f"a member must have plain numbers in range: {error}; correct the value") from error


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold the whole of `snapcore.json`: the program run, why it stopped, the members by index, and its own digest."""

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
        StoreError: there is none, it cannot be read, or another version of snapcore wrote its format.
        CorruptSnapshotError: it is not what snapcore writes.
    """
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"{directory} holds no run: there is no {MANIFEST}; check the path") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    try:
        return _parse(path, data)
    except _REFUSALS as error:
        raise CorruptSnapshotError(f"{path} is not a manifest that snapcore writes: {error}; restore it") from error


def _parse(path: Path, data: bytes) -> Manifest:
    # The format comes first: a later one may have fields that this version would call errors.
    version = msgspec.json.decode(data, type=_Version).format
    if version != FORMAT:
        raise StoreError(f"{path} has format {version}, this snapcore reads format {FORMAT}; upgrade snapcore")
    manifest = msgspec.json.decode(data, type=Manifest)
    members = sorted(manifest.members, key=lambda each: each.index)
    return msgspec.structs.replace(manifest, members=tuple(members))


def format_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as JSON that people can read, and that `read_manifest` is sure to accept.

    Raises:
        StoreError: it holds something that would not be accepted.
    """
    try:
        data = msgspec.json.encode(sealed(manifest))
        msgspec.json.decode(data, type=Manifest)
    except _REFUSALS as error:
        raise StoreError(f"a manifest must be what {MANIFEST} can hold: {error}; pass plain values") from error
    return msgspec.json.format(data, indent=2) + b"\n"


def sealed(manifest: Manifest) -> Manifest:
    """Return the manifest with the digest of all the rest of it."""
    return msgspec.structs.replace(manifest, sha256=_digest(manifest))


def is_sealed(manifest: Manifest) -> bool:
    """Tell whether a manifest has the digest of its content, or never had one."""
    return manifest.sha256 in ("", _digest(manifest))


def _digest(manifest: Manifest) -> str:
    """Return the SHA-256 of all but the digest itself; spaces and line ends do not count."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, sha256=""))).hexdigest()


def plain(program: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `program` as JSON gives it back.

    Raises:
        StoreError: it holds something that JSON has no word for, such as an array or NaN.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(program, allow_nan=False))
    except _REFUSALS as error:
        raise StoreError(f"program must be plain JSON: {error}; pass a program's to_dict()") from error
    return copy


def entry(member: Member) -> str:
    """Return what a member's own file repeats of the manifest: all but the digest, as JSON."""
    return msgspec.json.encode(_without_digest(member)).decode()


def describes(text: str, member: Member) -> bool:
    """Tell whether `text`, found in a file, is the entry of `member`."""
    try:
        return bool(msgspec.json.decode(text) == _without_digest(member))
    except _REFUSALS:
        return False


def _without_digest(member: Member) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(member)
    del fields["sha256"]
    return fields
