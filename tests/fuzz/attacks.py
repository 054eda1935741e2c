"""What is done to the files of a run: damage, which every digest must find, and forgery, which bears a new digest."""

import hashlib
import json
import os
import stat
import struct
from typing import NamedTuple

from snapcore.errors import StoreError
from snapcore.store import seal

from .oracle import header_of, tensors_of
from .run import FILES, HISTORY, JOB, MANIFEST, MEMBER, POINT, PREDICTIONS, RECIPE, RESULTS

NUMBERS = [
    *(sign * 2**bits + more for bits in (0, 7, 31, 32, 53, 63, 64, 200) for sign in (1, -1) for more in (-1, 0, 1)),
    *(10**6, 10**6 + 1, 10**9, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.5, 5e-324, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
]
TEXTS = [
    "",
    "\0",
    "x" * 10**5,
    "../../mine",
    "/etc/passwd",
    "\x1b[31m\n",
    "\ud800",
    "é\u202e",
    "0" * 64,
    "F8_E4M3",
    "[]",
]
DEEP, LONG = "brackets within brackets", "digits after digits"  # stand for what Python itself does not write
DEPTHS = (10**3, 10**5)


class Attack(NamedTuple):
    """One way to attack one file; an empty name is the run's directory itself.

    Arguments:
        name: the file's.
        how: what is done to it, in words.
        do: does it, with (run, name, rng).
        forged: whether it bears the digests of its new content, so that a reader may believe it.
    """

    name: str
    how: str
    do: object
    forged: bool = False


# ------------------------------------------------------------------------------------------------ bytes


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(data)


def spliced(data, rng):
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    at = rng.randrange(len(data) + 1)
    piece = data[start:stop]
    return rng.choice(
        (
            lambda: data[:start] + data[stop:],
            lambda: data[:at] + piece + data[at:],
            lambda: data[:at] + rng.randbytes(rng.randrange(1, 99)) + data[at:],
            lambda: data[:start] + bytes(stop - start) + data[stop:],
            lambda: data[:start] + piece[::-1] + data[stop:],
            lambda: data + piece,
        )
    )()


def on_bytes(alter):
    def attack(run, name, rng):
        path = run / name
        path.write_bytes(alter(path.read_bytes(), rng))

    return attack


def swapped(run, name, rng):
    """Another file of the run in its place."""
    other = rng.choice([each for each in FILES if each != name])
    (run / name).write_bytes((run / other).read_bytes())


# ------------------------------------------------------------------------------------------------ values of JSON


def altered(content, rng):
    """Return JSON with one to three of its values, names or items replaced, dropped, doubled or added."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if slots := [*_slots(content)]:
            rng.choice(EDITS)(*rng.choice(slots), slots, rng)
    return content


def _drop(outer, key, slots, rng):
    del outer[key]


def _rename(outer, key, slots, rng):
    if isinstance(outer, dict):
        outer[rng.choice(TEXTS)] = outer.pop(key)
    else:
        outer.insert(key, outer[key])


def _repeat(outer, key, slots, rng):
    other, place = rng.choice(slots)
    outer[key] = json.loads(json.dumps(other[place]))


def _make_all_numbers_one(outer, key, slots, rng):
    """Such as as many members as updates, and more of both than there is memory for."""
    number = rng.choice(NUMBERS)
    for each in _keys(outer):
        if type(outer[each]) in (int, float):
            outer[each] = number


def _add(outer, key, slots, rng):
    if isinstance(outer[key], list):
        outer[key].append(_hostile(rng))
    elif isinstance(outer[key], dict):
        outer[key][rng.choice(TEXTS)] = _hostile(rng)


def _replace(outer, key, slots, rng):
    outer[key] = _hostile(rng)


def _make_another_number(outer, key, slots, rng):
    outer[key] = rng.choice(NUMBERS) if type(outer[key]) in (int, float) else _hostile(rng)


EDITS = [_drop, _rename, _repeat, _make_all_numbers_one, _add, _replace, _replace, *[_make_another_number] * 3]


def _slots(content):
    """Yield (container, key) of every value; of a long list the first and the last, which stand for the others."""
    for key in _keys(content):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _slots(content[key])


def _keys(content):
    if isinstance(content, dict):
        return list(content)
    return list(range(len(content))) if len(content) < 9 else [0, 1, len(content) - 1]


def _hostile(rng):
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice((None, True, False, {}, []))
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice(([], [[]], [None] * 1000, {"": {}}, {str(n): n for n in range(1000)}, DEEP, LONG))
    if kind == 3:
        value = rng.choice(NUMBERS)
        for _ in range(rng.choice((1, 50, 200))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(NUMBERS)


def written(content, rng):
    """Return the text of any JSON, NaN and huge numbers too."""
    text, depth = json.dumps(content).encode(), rng.choice(DEPTHS)
    return text.replace(f'"{DEEP}"'.encode(), b"[" * depth + b"]" * depth).replace(f'"{LONG}"'.encode(), b"9" * depth)


def sealed(content, rng):
    """Return JSON with its digest; what `seal` refuses is sealed as well as it can be."""
    content.pop("sha256", None)
    try:
        return seal(content)
    except StoreError:
        dense = written({**content, "sha256": ""}, rng)
        return written({**content, "sha256": hashlib.sha256(dense).hexdigest()}, rng)


def with_values(run, name, rng):
    path = run / name
    path.write_bytes(written(altered(json.loads(path.read_bytes()), rng), rng))


def with_sealed_values(run, name, rng):
    path, content = run / name, json.loads((run / name).read_bytes())
    del content["sha256"]
    path.write_bytes(sealed(altered(content, rng), rng))


def with_sealed_program(run, name, rng):
    content = json.loads((run / name).read_bytes())
    (run / name).write_bytes(sealed({**content, "program": altered(content["program"], rng)}, rng))


# ------------------------------------------------------------------------------------------------ files of tensors


def with_length(run, name, rng):
    data = (run / name).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    hostile = [0, 1, 7, length - 1, length + 1, len(data) - 8, len(data), 2**25, 2**31, 2**32, 2**63, 2**64 - 1]
    (run / name).write_bytes(struct.pack("<Q", rng.choice([*hostile, rng.randrange(2**64)])) + data[8:])


def with_header(run, name, rng):
    header, body = header_of((run / name).read_bytes())
    _write_tensors(run / name, _hostile_header(header, rng), body, rng)


def with_sealed_header(run, name, rng):
    header, body = header_of((run / name).read_bytes())
    header = _hostile_header(header, rng)
    _seal_tensors(run, name, header, body, rng)


def with_sealed_numbers(run, name, rng):
    """Other values of the tensors: NaN and infinities among them."""
    header, body = header_of((run / name).read_bytes())
    _seal_tensors(run, name, header, flipped(body, rng) if rng.random() < 0.5 else b"\xff" * len(body), rng)


def with_sealed_state(run, name, rng):
    """Another resume point."""
    header, body = header_of((run / name).read_bytes())
    header["__metadata__"]["snapcore"] = written(
        altered(json.loads(header["__metadata__"]["snapcore"]), rng), rng
    ).decode()
    _seal_tensors(run, name, header, body, rng)


def with_sealed_facts(run, name, rng):
    """What predictions are said to be, and of what."""
    header, body = header_of((run / name).read_bytes())
    header["__metadata__"]["facts"] = written(altered(json.loads(header["__metadata__"]["facts"]), rng), rng).decode()
    _seal_tensors(run, name, header, body, rng)


def with_sealed_entry(run, name, rng):
    """Another entry, in the member's file and in the manifest."""
    header, body = header_of((run / name).read_bytes())
    entry = altered(json.loads(header["__metadata__"]["snapcore"]), rng)
    header["__metadata__"]["snapcore"] = written(entry, rng).decode()
    _seal_tensors(run, name, header, body, rng, entry=entry)


def _hostile_header(header, rng):
    """Return a header with another shape, type, range or metadata; half of the time one that keeps its own sizes."""
    names = [name for name in header if name != "__metadata__"]
    name, kind = rng.choice(names), rng.randrange(6)
    size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
    if kind == 0:
        shape = rng.choice(([0, 2**63], [2**32, 2**32], [1] * 64 + [size], [size, 0], [-size], [2**62], [size, 1, 1]))
        header[name] |= {"shape": shape, "dtype": rng.choice(("U8", "I8", "BOOL", "F8_E4M3", "F4"))}
    elif kind == 1:
        header[name]["dtype"] = rng.choice(("F64", "I64", "U64", "C64", "BF16", "F16", "I16", "F8_E5M2", "E8M0", ""))
    elif kind == 2:
        aliases = {rng.choice([*TEXTS[:1], *names]): rng.choice([*names, "nothing"]) for _ in range(3)}
        header["__metadata__"]["aliases"] = json.dumps(aliases)
    elif kind == 3:
        header[rng.choice([*TEXTS[:6], "weights/more"])] = header.pop(name)
    else:
        header = altered(header, rng)
    return header


def _write_tensors(path, header, body, rng):
    text = written(header, rng)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _seal_tensors(run, name, header, body, rng, entry=None):
    """Write a file of tensors with the digest that it needs: a member's is in the manifest, that of others in it."""
    path, key = run / name, _DIGESTED.get(name)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and isinstance(metadata.get(key), str):
        metadata["sha256"] = _digest_within(header, body, key)
    _write_tensors(path, header, body, rng)
    if key is not None:
        return
    manifest = json.loads((run / MANIFEST).read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["members"][1] = {**(entry or manifest["members"][1]), "sha256": digest}
    (run / MANIFEST).write_bytes(sealed(manifest, rng))


_DIGESTED = {POINT: "snapcore", PREDICTIONS: "facts"}
"""The metadata that a file's own digest is of, beside its tensors."""


def _digest_within(header, body, key):
    try:
        tensors = tensors_of(header, body)
        digest = hashlib.sha256(header["__metadata__"][key].encode())
    except (ValueError, TypeError, KeyError, LookupError, AttributeError, OverflowError, MemoryError):
        return "0" * 64
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode(errors="replace") + array.tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ tables


def with_cells(run, name, rng):
    rows = [line.split(",") for line in (run / name).read_text().splitlines()]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(
        ["", "nan", "inf", "-1", "1e999", "0x1", "9" * 5000, "\x00", '"', "1_0", "٣", str(rng.choice(NUMBERS[:-12]))]
    )
    (run / name).write_text("\r\n".join(",".join(row) for row in rows) + "\r\n")


# ------------------------------------------------------------------------------------------------ no files


def pipe(path):
    os.mkfifo(path)


def listener(path):
    os.mknod(path, 0o600 | stat.S_IFSOCK)


def folder(path):
    path.mkdir()


def full_folder(path):
    path.mkdir()
    (path / "within").mkdir()
    (path / "mine").write_text("mine")


def link_to_nothing(path):
    path.symlink_to("nowhere")


def link_to_itself(path):
    path.symlink_to(path.name)


def link_to_all_zeros(path):
    path.symlink_to("/dev/zero")


def link_to_mine(path):
    path.symlink_to(_outside(path) / "mine")


def link_to_my_folder(path):
    path.symlink_to(_outside(path) / "folder")


def link_to_another(path):
    path.symlink_to(MEMBER if path.name != MEMBER else MANIFEST)


def hard_link_to_mine(path):
    os.link(_outside(path) / "mine", path)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(2**42)


def empty(path):
    path.touch()


def nothing(path):
    pass


def _outside(path):
    return next(each for each in path.parents if each.name == "run").parent if path.name != "run" else path.parent


NO_FILES = [
    pipe,
    listener,
    folder,
    full_folder,
    link_to_nothing,
    link_to_itself,
    link_to_all_zeros,
    link_to_mine,
    link_to_my_folder,
    link_to_another,
    hard_link_to_mine,
    sparse,
    empty,
    nothing,
]


def by_no_file(run, name, rng):
    path = run / name
    if path.is_dir():
        _delete(path)
    else:
        path.unlink(missing_ok=True)
    rng.choice(NO_FILES)(path)


def lengthened(run, name, rng):
    """The file is whole, and a terabyte of nothing follows."""
    os.truncate(run / name, 2**42)


def _delete(folder):
    for path in folder.iterdir():
        _delete(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


BYTES = [Attack(name, alter.__name__, on_bytes(alter)) for name in FILES for alter in (truncated, flipped, spliced)]
ATTACKS = [
    *BYTES,
    *(Attack(name, "swapped for another", swapped, forged=True) for name in FILES),
    *(Attack(name, "made longer", lengthened) for name in FILES),
    *(Attack(name, "values", with_values) for name in (MANIFEST, JOB, RESULTS, RECIPE)),
    *(Attack(name, "values, sealed", with_sealed_values, forged=True) for name in (MANIFEST, JOB, RESULTS, RECIPE)),
    Attack(MANIFEST, "program, sealed", with_sealed_program, forged=True),
    *(Attack(name, "length of the header", with_length) for name in (MEMBER, POINT, PREDICTIONS)),
    *(Attack(name, "header", with_header) for name in (MEMBER, POINT, PREDICTIONS)),
    *(Attack(name, "header, sealed", with_sealed_header, forged=True) for name in (MEMBER, POINT, PREDICTIONS)),
    *(Attack(name, "numbers, sealed", with_sealed_numbers, forged=True) for name in (MEMBER, POINT, PREDICTIONS)),
    Attack(MEMBER, "entry, sealed", with_sealed_entry, forged=True),
    Attack(POINT, "state, sealed", with_sealed_state, forged=True),
    Attack(PREDICTIONS, "facts, sealed", with_sealed_facts, forged=True),
    Attack(HISTORY, "cells", with_cells),
    *(Attack(name, "replaced by no file", by_no_file) for name in (*FILES, ".lock", "resume", "predictions", "")),
]
