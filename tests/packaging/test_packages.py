"""The wheel and the sdist, as they are built, looked into and installed outside of the source tree."""

import csv
import json
import math
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

pytestmark = pytest.mark.xdist_group("packaging")  # what its tests share is built once

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
NAMES = {Path(package).name for package in PACKAGES}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, the wheel, and the wheel that is built of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("built")
    build(ROOT, folder, "sdist", "wheel")
    sdist, wheel = (next(folder.glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    build(unpacked, folder / "again", "wheel")
    return SimpleNamespace(unpacked=unpacked, wheel=wheel, again=next((folder / "again").glob("*.whl")))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Run Python in an empty folder, where the wheel is installed and the source tree is out of reach."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", built.wheel)
    # The dependencies are those of the environment that runs this. Its own .pth files, which would lead back to the
    # source tree of an editable install, are not read: only what stands in a site directory is.
    site = Path(run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (folder / "empty").mkdir()
    return lambda program, *words: run(folder / "env" / "bin" / program, *words, cwd=folder / "empty")


def build(source, folder, *targets):
    words = [word for target in targets for word in ("--target", target)]
    run(sys.executable, "-m", "hatchling", "build", "--directory", folder, *words, cwd=source)


def run(*words, cwd=None):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder.parent)) for path in paths}


def record_of(wheel):
    """The files of a wheel and their digests, as it lists them itself."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        return {path: digest for path, digest, _ in csv.reader(archive.read(name).decode().splitlines())}


def test_the_wheel_holds_the_packages_whole_and_typed_and_nothing_else(built):
    content = {path for path in record_of(built.wheel) if ".dist-info/" not in path}
    assert content == set().union(*(files_of(ROOT / package) for package in PACKAGES))
    assert {f"{name}/py.typed" for name in NAMES} <= content


def test_the_sdist_holds_the_tests_the_documentation_and_the_examples(built):
    held = files_of(built.unpacked)
    for folder in ("snapcore", "backends", "tests", "examples", "docs"):
        ours = {path for path in files_of(ROOT / folder) if not path.startswith("docs/_build/")}
        assert {f"{built.unpacked.name}/{path}" for path in ours} <= held
    files = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile", "constraints.txt"}
    assert {f"{built.unpacked.name}/{name}" for name in files} <= held


def test_a_wheel_built_of_the_sdist_is_the_same_file_by_file(built):
    assert record_of(built.again) == record_of(built.wheel)


def test_what_is_installed_is_imported_from_an_empty_folder(installed):
    code = """
import json, snapcore, snapcore.schedule, snapcore.testing
cycles = snapcore.schedule.CosineCycles(lr=0.2, steps=100, cycles=4)
print(json.dumps([snapcore.__file__, snapcore.testing.BackendConformance.__module__, [cycles(0), cycles(25)]]))
"""
    file, suite, rates = json.loads(installed("python", "-I", "-c", code))
    assert Path(file).parents[4].name == "env"
    assert suite.startswith("snapcore.testing")
    assert rates == [0.2, 0.2]


def test_a_backend_elsewhere_is_held_to_the_suite_that_is_installed(installed, tmp_path):
    for name in ("test_numpy.py", "numpy_backend.py"):
        (tmp_path / name).write_bytes((ROOT / "tests" / "conformance" / name).read_bytes())
    (tmp_path / "__init__.py").touch()
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "test_numpy.py", "-k", "TestNumpyBackend")
    assert " passed" in installed("python", "-I", *words).splitlines()[-1]


def test_every_entry_point_leads_to_a_file_that_is_installed(installed):
    code = """
import importlib.metadata, json
mine = importlib.metadata.distribution("snapcore")
print(json.dumps([str(mine.locate_file("")), {each.name: each.value for each in mine.entry_points}]))
"""
    site, found = json.loads(installed("python", "-I", "-c", code))
    assert found == {**PROJECT["scripts"], **PROJECT["entry-points"]["snapcore.backends"]}
    for target in found.values():
        path = Path(site, *target.partition(":")[0].split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_the_command_is_installed_and_runs(installed):
    last = 0.1 / 2 * (1 + math.cos(math.pi * 24 / 25))
    assert f"{last:.4g}" in installed("snapcore", "schedule", "--lr", "0.1", "--steps", "100", "--cycles", "4")


def test_the_citation_names_this_version_and_this_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]


def test_the_python_named_oldest_is_the_one_that_is_required():
    named = [word.rpartition(" ")[2] for word in PROJECT["classifiers"] if " :: 3." in word]
    assert PROJECT["requires-python"] == f">={named[0]}"
