"""Run a part in processes of its own, for a time of its own, whatever becomes of them."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from worker import Results, record

WORKER = Path(__file__).with_name("worker.py")
GRACE = 10.0
"""Seconds that a process may take to stop once its time is used."""
LINES = 200
"""Of what a part has said, kept where something failed."""


class Part(NamedTuple):
    """What one process runs.

    Arguments:
        name: of a module with a `suite`; of one that ends in `_tests` it counts whether it can begin.
        weight: its share of the time that is left, beside those of the parts after it.
        environment: what its libraries read when they start.
    """

    name: str
    weight: float = 1.0
    environment: dict[str, str] = {}  # noqa: RUF012  only read


def run_part(part: Part, folder: Path, size: str, end: float) -> dict[str, Any]:
    """Run a part in as many processes as it brings down, until `end`; return what became of each of its cases."""
    results, log = Results(folder / f"{part.name}.results"), folder / f"{part.name}.log"
    began = time.monotonic()
    while True:
        before = len(results.cases())
        ended = run_process(part, results, log, folder, size, end)
        close_what_was_begun(results, ended)
        if ended is None or len(results.cases()) == before or time.monotonic() > end:
            break
    cases = outcome(part, results, ended, log)
    failed = ended or any(case["status"] == "failed" for case in cases)
    return {
        "part": part.name,
        "about": next((line["about"] for line in results.read() if "about" in line), None),
        "seconds": time.monotonic() - began,
        "cases": cases,
        "log": log.read_text(errors="replace").splitlines()[-LINES:] if failed else [],
    }


def run_process(part: Part, results: Results, log: Path, folder: Path, size: str, end: float) -> str | None:
    """Run what has no result yet in one process; return None, or how it ended before it was done."""
    scratch = Path(tempfile.mkdtemp(prefix=part.name, dir=folder))
    left = end - time.monotonic()
    command = [sys.executable, str(WORKER), part.name, str(results.path), str(scratch), size, str(left)]
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **part.environment},
            start_new_session=True,
        )
        try:
            code = process.wait(max(left, 0) + GRACE)
        except subprocess.TimeoutExpired:
            return f"it did not stop {GRACE:.0f} s after its time was used"
        finally:
            end_group(process)
            shutil.rmtree(scratch, ignore_errors=True)
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with code {code}" if code else None


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what the process has left behind, such as workers that compile, and itself if it still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing was left
        return
    process.wait()


def close_what_was_begun(results: Results, ended: str | None) -> None:
    """Write down how the case ended that a process did not come back from."""
    lines = results.read()
    begun = [line for line in lines if "begun" in line]
    if not begun or begun[-1]["begun"]["name"] in {case["name"] for case in results.cases()}:
        return
    last = begun[-1]
    case = {**last["begun"], "seconds": time.time() - last["at"]}
    if case["seconds"] < last["limit"]:
        case |= {"status": "failed", "reason": ended}
    results.write(case=case)


def outcome(part: Part, results: Results, ended: str | None, log: Path) -> list[dict[str, Any]]:
    """Return every case of the part; if it could not even say which it has, one that says why."""
    plan = next((line["plan"] for line in results.read() if "plan" in line), None)
    if plan is None:
        said = log.read_text(errors="replace").strip().splitlines()
        kind = "test" if part.name.endswith("_tests") else "comparison"
        return [record("the part begins", kind, "failed", said[-1] if said else ended)]
    return list({case["name"]: case for case in [*plan, *results.cases()]}.values())
