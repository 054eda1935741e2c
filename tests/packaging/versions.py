"""Run the core's tests on each Python that the project names, and on the lowest versions that its dependencies allow.

    python tests/packaging/versions.py [3.11 3.12 … lowest]

Each run has an environment of its own in .venv/versions. A Python that is not on this machine is left out, and named at
the end; one that is asked for must be there.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OLDEST, *NEWER = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
CORE = ("tests/core", "tests/conformance/test_numpy.py")


def main(asked: list[str]) -> int:
    pythons = {version: find_python(version) for version in (OLDEST, *NEWER)}
    pythons["lowest"] = pythons[OLDEST]
    unknown = set(asked) - set(pythons)
    if unknown:
        print(f"no such run: {', '.join(sorted(unknown))}; there are {', '.join(pythons)}")
        return 2
    outcomes = {name: outcome(name, pythons[name], required=name in asked) for name in asked or pythons}
    print("", *(f"{name:7} {said}" for name, said in outcomes.items()), sep="\n")
    return any(said.startswith("FAILED") for said in outcomes.values())


def find_python(version: str) -> str | None:
    """Return the path of a Python: on the PATH, or kept by pyenv, whose stand-ins on the PATH may lead nowhere."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for path in (shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    return None


def outcome(name: str, python: str | None, *, required: bool) -> str:
    if python is None:
        return "FAILED: no such Python on this machine" if required else "left out: no such Python on this machine"
    print(f"== {name}: {python}", flush=True)
    tests = subprocess.run([environment(name, python), "-m", "pytest", "-n", "2", "-q", *CORE], cwd=ROOT, check=False)
    return "FAILED: see above" if tests.returncode else "passed"


def environment(name: str, python: str) -> Path:
    """Make an environment with the core and what its tests need; return its Python."""
    path = ROOT / ".venv" / "versions" / name
    subprocess.run([python, "-m", "venv", "--clear", path], check=True)
    limits = path / "constraints.txt"
    limits.write_text(lowest() if name == "lowest" else (ROOT / "constraints.txt").read_text())
    pip = [path / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip>=25.1"], cwd=ROOT, check=True)
    subprocess.run([*pip, "-c", limits, "-e", ".", "--group", "core"], cwd=ROOT, check=True)
    return path / "bin" / "python"


def lowest() -> str:
    """Return the project's constraints, in which each dependency of the core is at its lower bound."""
    floors = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    others = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.partition("==")[0] not in floors
    ]
    return "\n".join([*others, *(f"{name}=={floor}" for name, floor in floors.items())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
