"""JSON files that carry their own SHA-256, so that an altered one is not believed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from snapcore.errors import CorruptSnapshotError, StoreError

# What converting JSON, text and numbers raises; msgspec's errors are ValueErrors.
REFUSALS = (TypeError, ValueError, OverflowError, RecursionError)

_SEAL = "sha256"


def seal(content: Mapping[str, Any]) -> bytes:
    """Return `content` as indented JSON with one more field, `sha256`.

    That is the SHA-256 of the same JSON without white space and with `sha256` empty.

    Raises:
        StoreError: it is not plain JSON.

    Example:
        >>> print(seal({"seed": 7}).decode(), end="")
        {
          "seed": 7,
          "sha256": "0ab5a1ffd10d7174729fbf88066b431369caaa0e418bbbf0653d7c559bb01771"
        }
        >>> unseal(seal({"seed": 7}))
        {'seed': 7}
    """
    plain = to_plain(content, "a sealed file")
    try:
        return msgspec.json.format(msgspec.json.encode({**plain, _SEAL: _digest(plain)}), indent=2) + b"\n"
    except REFUSALS as error:
        raise StoreError(f"a sealed file must be plain JSON: {error}; pass plain values") from error


def unseal(data: bytes, what: object = "it") -> dict[str, Any]:
    """Return the content of a sealed file, without its `sha256`.

    Arguments:
        data: what `seal` returned, and a file kept.
        what: what the message calls it, such as its path.

    Raises:
        CorruptSnapshotError: it is not JSON, has no SHA-256, or not that of its content.
    """
    try:
        content = msgspec.json.decode(data, type=dict[str, Any])
        recorded = content.pop(_SEAL, None)
        if recorded != _digest(content):
            found = "no SHA-256" if recorded is None else "another SHA-256 than its content"
            raise ValueError(f"it has {found}, so it was altered")
    except REFUSALS as error:
        raise CorruptSnapshotError(f"{what} is not as it was written: {error}; restore it") from error
    return content


def to_plain(content: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return a copy of `content` as JSON gives it back.

    Raises:
        StoreError: it holds something that JSON cannot represent, such as an array or NaN.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    except REFUSALS as error:
        raise StoreError(f"{what} must be plain JSON: {error}; pass numbers, text, lists and dictionaries") from error
    return copy


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode({**content, _SEAL: ""})).hexdigest()
