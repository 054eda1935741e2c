"""What the files of a run say, read in the plainest way; and whether what a reader got is that."""

import json
import math
import struct

import ml_dtypes
import msgspec
import numpy as np

from snapcore.lab.job import Job

from .run import JOB, MANIFEST, POINT, PREDICTIONS, RESULTS

DTYPES = {
    **{"BOOL": np.bool_, "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32},
    **{"U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"F32": np.float32, "F64": np.float64, "C64": np.complex64},
}

_DEFAULTS = {"unfinished": False, "metrics": None}


def header_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def tensors_of(header, body):
    """Return the arrays of a safetensors file, tied ones under each of their names."""
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            arrays[name] = np.frombuffer(body[start:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    aliases = json.loads(header.get("__metadata__", {}).get("aliases", "{}"))
    return {**arrays, **{name: arrays[stored] for name, stored in aliases.items()}}


def bits(tensors):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tensors.items()}


def same(found, expected):
    """Compare values of JSON, however deep, where a whole number may have been read as a fraction."""
    pairs = [(found, expected)]
    while pairs:
        one, other = pairs.pop()
        if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
            pairs += [(one[key], other[key]) for key in one]
        elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
            pairs += zip(one, other, strict=True)
        elif type(one) is float and type(other) is int:
            pairs.append((one, float(other)))
        elif type(one) is not type(other) or isinstance(one, dict | list) or one != other:
            return False
    return True


def _manifest(run):
    content = json.loads((run / MANIFEST).read_bytes())
    members = sorted(({**_DEFAULTS, **entry} for entry in content.get("members", ())), key=lambda each: each["index"])
    return content.get("program"), content.get("stopped"), members


def _weights(run):
    return [bits(tensors_of(*header_of((run / each["file"]).read_bytes()))) for each in _manifest(run)[2]]


def _point(run):
    header, body = header_of((run / POINT).read_bytes())
    content = json.loads(header["__metadata__"]["snapcore"])
    member = content["member"] and {**_DEFAULTS, **content["member"]}
    return bits(tensors_of(header, body)), content["state"], member


def _resumed(run):
    return _point(run)[1]["place"]


def _job(run):
    content = json.loads((run / JOB).read_bytes())
    del content["sha256"]
    return {**msgspec.structs.asdict(Job(backend="")), **content}


def _results(run):
    content = json.loads((run / RESULTS).read_bytes())
    del content["sha256"]
    return content


def _predictions(run):
    header, body = header_of((run / PREDICTIONS).read_bytes())
    tensors, content = tensors_of(header, body), json.loads(header["__metadata__"]["facts"])
    facts = {"kind": "classes", "ignore": None, "split": None, "data": None, "members": None, **content}
    with np.errstate(over="ignore"):
        arrays = {"predictions": tensors["predictions"].astype(np.float32)}
    if "labels" in tensors:
        counted = facts["kind"] in ("classes", "labels")
        arrays["labels"] = tensors["labels"].astype(np.int64 if counted else np.float64)
    return [*facts.values()], bits(arrays)


SAID = {
    "manifest": _manifest,
    "weights": _weights,
    "point": _point,
    "resumed": _resumed,
    "job": _job,
    "results": _results,
    "predictions": _predictions,
}
"""By door, what the files say of what it reads: a forgery may be believed as it is, and not otherwise."""


def is_a_history(rows, rate):
    """A table has no digest; what is believed must at least be one: updates in a row, at their rates, finite."""
    steps = [step for step, _, _ in rows]
    return steps == list(range(min(steps, default=1), max(steps, default=0) + 1)) and all(
        step >= 1 and math.isclose(lr, rate(step - 1), rel_tol=1e-9) and math.isfinite(loss) for step, lr, loss in rows
    )
