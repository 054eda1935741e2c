"""The command of `make gpu`: all parts at a tiny size on the CPU, and parts that fail, crash, hang or do not begin."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import NoneType

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STRING, NUMBER = (str,), (int, float)

FILE = {
    **dict.fromkeys(("started", "python", "machine"), STRING),
    **dict.fromkeys(("format", "processors"), (int,)),
    **dict.fromkeys(("minutes", "seconds"), NUMBER),
    **dict.fromkeys(("command", "driver", "parts"), (list,)),
    "counts": (dict,),
}
PART = {"part": STRING, "about": (dict, NoneType), "seconds": NUMBER, "cases": (list,), "log": (list,)}
CASE = {
    **dict.fromkeys(("name", "kind", "status"), STRING),
    "reason": (str, NoneType),
    "seconds": NUMBER,
    "found": (dict,),
    "rows": (list,),
}
ROW = {
    **dict.fromkeys(("ours", "peer"), STRING),
    **dict.fromkeys(("seconds", "peer_seconds", "ratio"), (float,)),
    **dict.fromkeys(("low", "high"), (float, NoneType)),
    "pairs": (int,),
}


def run(output, *arguments, path=""):
    """Run the command where it sees no GPU; return how it ended, what it printed, and the file."""
    paths = [ROOT, ROOT / "backends", ROOT / "tests" / "bench", path]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, HERE, "--output", output, *arguments],
        env={**os.environ, **hidden, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout, json.loads(output.read_text())


def check_form(found):
    """Compare a file with the forms above, all the way down."""
    parts = found["parts"]
    cases = [case for part in parts for case in part["cases"]]
    rows = [row for case in cases for row in case["rows"]]
    for form, things in ((FILE, [found]), (PART, parts), (CASE, cases), (ROW, rows)):
        for thing in things:
            assert thing.keys() == form.keys()
            assert all(isinstance(thing[name], kinds) for name, kinds in form.items()), thing
    statuses = [case["status"] for case in cases]
    assert found["counts"] == {each: statuses.count(each) for each in ("passed", "measured", "failed", "not run")}


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("framework", "missing"), [("torch", "no CUDA device"), ("jax", "JAX finds no GPU")])
def test_on_a_cpu_all_is_run_but_what_needs_a_gpu(tmp_path, framework, missing):
    subjects = ("tests", "stall", "loop", "ensemble")
    names = [f"{framework}_{subject}" for subject in subjects]
    code, printed, found = run(tmp_path / "gpu.json", "--size", "tiny", "--minutes", "14", "--only", *names)
    check_form(found)
    assert [part["part"] for part in found["parts"]] == names
    assert {(part["about"]["device"], part["about"]["gpu"]) for part in found["parts"]} == {("cpu", False)}
    tests, *others = [part["cases"] for part in found["parts"]]
    reasons = {(case["status"], case["reason"]) for case in tests}
    assert reasons == {("passed", None), ("not run", missing)}, json.dumps(found, indent=1)
    compared = [case for cases in others for case in cases]
    assert {(case["kind"], case["status"]) for case in compared} == {("comparison", "measured")}, found["parts"]
    assert all(case["rows"] for case in compared)
    assert code == 0
    assert all(case["name"] in printed for case in [*tests, *compared])


BRITTLE = """
import os, signal
from cases import Suite, check
from compare import Contender

suite = Suite({"gpu": False, "device": "none", "no_gpu": "there is none"})

@suite.test("holds")
def _(setting):
    setting.found["beside it"] = os.listdir(setting.folder)

@suite.test("is killed")
def _(setting):
    os.kill(os.getpid(), signal.SIGKILL)

@suite.test("does not hold")
def _(setting):
    check(1 > 2, "one is not above two")

@suite.test("needs a GPU", needs_gpu=True)
def _(setting):
    raise AssertionError

@suite.comparison("two names for nothing")
def _(setting):
    setting.compare({"pass": Contender(lambda: None)}, {"None": Contender(lambda: None)})
"""


def test_a_case_that_brings_its_process_down_costs_itself_alone(tmp_path):
    (tmp_path / "brittle_tests.py").write_text(BRITTLE)
    code, printed, found = run(tmp_path / "gpu.json", "--only", "brittle_tests", path=tmp_path)
    check_form(found)
    [part] = found["parts"]
    assert {case["name"]: (case["status"], case["reason"]) for case in part["cases"]} == {
        "holds": ("passed", None),
        "is killed": ("failed", "its process was ended by SIGKILL"),
        "does not hold": ("failed", "AssertionError: one is not above two"),
        "needs a GPU": ("not run", "there is none"),
        "two names for nothing": ("measured", None),
    }
    assert part["cases"][0]["found"] == {"beside it": []}
    assert any(line.startswith("Traceback") for line in part["log"])
    assert "is killed: its process was ended by SIGKILL" in printed
    assert code == 1


HANGING = """
import time
from cases import Suite

suite = Suite({"gpu": False, "device": "none", "no_gpu": "there is none"})

@suite.test("hangs")
def _(setting):
    time.sleep(1000)

@suite.test("comes after it")
def _(setting):
    pass
"""


@pytest.mark.exhaustive
def test_a_case_that_hangs_is_ended_with_its_parts_time(tmp_path):
    (tmp_path / "hanging_tests.py").write_text(HANGING)
    arguments = ["--only", "hanging_tests", "--minutes", "0.25"]  # ten seconds of it are kept for the end
    _, _, found = run(tmp_path / "gpu.json", *arguments, path=tmp_path)
    [part] = found["parts"]
    assert [case["status"] for case in part["cases"]] == ["not run", "not run"]
    assert part["cases"][0]["reason"].endswith("s did not do")
    assert part["cases"][1]["reason"] == "no time was left"
    assert any("time.sleep" in line or "in _" in line for line in part["log"])


def test_a_part_that_cannot_begin_has_failed_if_it_holds_tests(tmp_path):
    code, _, found = run(tmp_path / "gpu.json", "--only", "absent_tests", "absent")
    check_form(found)
    assert [[case["kind"] for case in part["cases"]] for part in found["parts"]] == [["test"], ["comparison"]]
    reasons = [part["cases"][0]["reason"] for part in found["parts"]]
    assert reasons == [f"ModuleNotFoundError: No module named '{name}'" for name in ("absent_tests", "absent")]
    assert code == 1
