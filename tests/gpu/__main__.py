"""Test and measure snapcore on a GPU: `make gpu`, which is `python tests/gpu` with the paths that it needs.

Each part runs in a process of its own, for its share of the time: what crashes or hangs there costs that part alone,
and most often no more than the case that did. What was found is one JSON file, written anew after every part, and a
table. The command fails if a test failed; what was not run is listed with the reason.

On a machine without a GPU the same code runs at small sizes, and what needs one is not run.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compare import seconds
from processes import GRACE, Part, run_part

NEEDED = ("numpy", "safetensors", "ml_dtypes", "msgspec", "filelock")
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
EXACT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true",
    "NVIDIA_TF32_OVERRIDE": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}
"""What the tests need to compare bits, and to compare with float64."""
PARTS = [
    Part("torch_tests", 5, EXACT),
    Part("jax_tests", 4, SHARED | EXACT),
    Part("torch_stall", 2),
    Part("jax_stall", 2, SHARED),
    Part("torch_loop", 3),
    Part("jax_loop", 2, SHARED),
    Part("torch_ensemble", 2),
    Part("jax_ensemble", 2, SHARED),
]


def driver() -> list[dict[str, str]]:
    """Return what the driver says of its GPUs; nothing where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    names = ["name", "driver_version", "memory.total"]
    query = [command, f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(query, stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    return [dict(zip(names, line.split(", "), strict=True)) for line in done.stdout.splitlines()]


def counts(parts: list[dict[str, Any]]) -> dict[str, int]:
    """Count the cases by how they ended."""
    found = {"passed": 0, "measured": 0, "failed": 0, "not run": 0}
    for part in parts:
        for case in part["cases"]:
            found[case["status"]] += 1
    return found


def table(parts: list[dict[str, Any]]) -> Iterator[str]:
    """Describe every part's device, how its cases ended, and its ratios."""
    for part in parts:
        about = part["about"] or {}
        versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "jax", "cuda") if name in about)
        on = f"on {about['device']}, {about['size']} size" if about else "did not begin"
        yield f"{part['part']}: {versions} {on}, {part['seconds']:.0f} s"
        for case in part["cases"]:
            yield f"  {case['status']:8} {case['name']}" + (f": {case['reason']}" if case["reason"] else "")
            yield from map(described, case["rows"])


def described(row: dict[str, Any]) -> str:
    low, high = (f"{row[name]:.3f}" if row[name] is not None else "–" for name in ("low", "high"))
    ours, peer = (
        f"{row[name]} ({seconds(row[time])})" for name, time in (("ours", "seconds"), ("peer", "peer_seconds"))
    )
    return f"    {row['ratio']:8.3f} [{low}, {high}] of {row['pairs']:2}  {ours} / {peer}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = Path(os.environ.get("OUT", "."), "gpu.json")
    parser.add_argument(
        "--output", type=Path, default=default, help="the JSON file; by default gpu.json, in $OUT if set"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; each part has a share")
    parser.add_argument(
        "--size", choices=["full", "small", "tiny"], default="", help="by default, what suits the device"
    )
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--only", nargs="+", default=names, metavar="PART", help=f"modules; by default {' '.join(names)}"
    )
    return parser.parse_args()


def main() -> int:
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    options = parsed()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"make gpu needs {', '.join(missing)}: put a folder that has them on PYTHONPATH", file=sys.stderr)
        return 2
    end = began + 60 * options.minutes - GRACE
    known = {part.name: part for part in PARTS}
    chosen = [known.get(name, Part(name)) for name in options.only]
    found: dict[str, Any] = {
        "format": 1,
        "started": started,
        "command": sys.orig_argv,
        "minutes": options.minutes,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processors": os.cpu_count(),
        "driver": driver(),
        "parts": [],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for position, part in enumerate(chosen):
            share = part.weight / sum(each.weight for each in chosen[position:])
            now = time.monotonic()
            found["parts"].append(run_part(part, Path(folder), options.size, now + share * (end - now)))
            found |= {"seconds": time.monotonic() - began, "counts": counts(found["parts"])}
            options.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    summary = ", ".join(f"{count} {status}" for status, count in found["counts"].items())
    print(*table(found["parts"]), f"{summary}; {found['seconds']:.0f} s; {options.output}", sep="\n")
    cases = [case for part in found["parts"] for case in part["cases"]]
    return int(any(case["kind"] == "test" and case["status"] == "failed" for case in cases))


if __name__ == "__main__":
    sys.exit(main())
