"""Run one part's cases in this process; write each result down before the next case begins.

    python tests/gpu/worker.py torch_tests RESULTS FOLDER SIZE SECONDS

What is already in RESULTS is not run again: when a case brings the process down, another process does the rest.
"""

import faulthandler
import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any, cast

from cases import Case, NotRun, Setting, Size, Suite

LEAST = 60.0
"""Seconds that every case may take, as long as the part has them."""
MEASURING = 0.8
"""What of its share a case may have used when it begins another turn, which may last."""
LATE = 5.0
"""Seconds that the last case may take beyond the part's end; the process that waits for this one allows for more."""
PASSED = {"test": "passed", "comparison": "measured"}


class Results:
    """A file of one JSON object a line: `about` and `plan` once for each process, `begun` and `case` for each case."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return what is there, in the order it was written; a line that a crash has cut off is left out."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().split("\n")[:-1]]

    def cases(self) -> list[dict[str, Any]]:
        """Return the cases that have come to an end."""
        return [line["case"] for line in self.read() if "case" in line]

    def write(self, **line: Any) -> None:
        """Add a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def record(name: str, kind: str, status: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
    """Describe how a case has ended."""
    empty: dict[str, Any] = {"seconds": 0.0, "found": {}, "rows": []}
    return {"name": name, "kind": kind, "status": status, "reason": reason, **empty, **more}


def run_all(suite: Suite, results: Results, folder: Path, size: Size, seconds: float) -> None:
    """Run the cases that have no result yet, each for its share of the seconds left."""
    end = time.monotonic() + seconds
    done = {case["name"] for case in results.cases()}
    left = [case for case in suite.cases if case.name not in done]
    results.write(about={**suite.about, "size": size})
    results.write(plan=[record(case.name, case.kind, "not run", "no time was left") for case in left])
    while left and (now := time.monotonic()) < end:
        share = (end - now) * left[0].share / sum(case.share for case in left)
        limit = min(end - now, max(2 * share, LEAST)) + LATE
        path = folder / str(len(left))
        path.mkdir()
        run_one(left.pop(0), Setting(path, size, now + MEASURING * share), limit, suite, results)
        gc.collect()


def run_one(case: Case, setting: Setting, limit: float, suite: Suite, results: Results) -> None:
    """Run a case and write down how it ended; before, how it did should nothing more be written."""
    status = "not run" if limit < LEAST else "failed"  # that little was left for it is not its fault
    results.write(begun=record(case.name, case.kind, status, f"{limit:.0f} s did not do"), at=time.time(), limit=limit)
    faulthandler.dump_traceback_later(limit, exit=True)  # even out of a call that never returns to Python
    began, reason = time.monotonic(), None
    try:
        if case.needs_gpu and not suite.about["gpu"]:
            raise NotRun(suite.about["no_gpu"])
        case.run(setting)
        status = PASSED[case.kind]
    except NotRun as why:
        status, reason = "not run", str(why)
    except Exception as error:  # noqa: BLE001  whatever it raises is its result
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {error}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    kept = {"seconds": time.monotonic() - began, "found": setting.found, "rows": setting.rows}
    results.write(case=record(case.name, case.kind, status, reason, **kept))


def main(part: str, results: str, folder: str, size: str, seconds: str) -> None:
    began = time.monotonic()
    suite = importlib.import_module(part).suite
    chosen = size or ("full" if suite.about["gpu"] else "small")
    run_all(
        suite, Results(Path(results)), Path(folder), cast("Size", chosen), float(seconds) + began - time.monotonic()
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
