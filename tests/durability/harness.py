"""Start the command in processes of its own, end them, and compare what the runs have become."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from snapcore.store import MANIFEST, SnapshotStore
from snapcore.store.resume_point import FILE, FOLDER

from .kill_model import HOLD, SLOW
from .sabotage import Fault

HERE = Path(__file__).parent
METHODS = ("snapshot", "singlecycle", "star")
UPDATES, CYCLE, EVERY = 60, 20, 5
POINT = Path(FOLDER, FILE)
_JOB = (
    "train --backend torch --data digits --model kill_model:network --train-limit 320 --epochs 12 --cycles 3 --seed 7"
)
ENDED = "after the end"
_GLANCE = 0.005  # seconds
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def arguments(directory: Path, method: str = "snapshot", *more: str) -> list[str]:
    """Return the command's arguments: 60 updates, members after 20, 40 and 60, a resume point every 5."""
    return [*_JOB.split(), "--resume-every", str(EVERY), "--method", method, "--output", str(directory), *more]


def environment() -> dict[str, str]:
    """Return the environment of a child: one thread, and the model importable."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths)}


@dataclass
class Child:
    """A started command."""

    pid: int
    log: Path
    zygote: "Zygote"

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)  # the number is not taken by another process before `wait`

    def wait(self) -> int | None:
        """Return the exit code once it ends, negative for a signal, or None once it stops."""
        return self.zygote.ask({"wait": self.pid})["code"]

    @property
    def output(self) -> str:
        return self.log.read_text()


class Zygote:
    """Starts commands that need not import anything."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, str(HERE / "zygote.py")]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment())
        self.framework = f"torch {self._answer()['ready']}"

    def start(self, directory: Path, method: str = "snapshot", *more: str, fault: Fault | None = None) -> Child:
        return self.command(arguments(directory, method, *more), directory, fault)

    def command(self, words: list[str], directory: Path, fault: Fault | None = None) -> Child:
        log = directory.with_name(f"{directory.name}.log")
        log.touch()
        request = {"arguments": words, "folder": str(directory.parent), "log": str(log)}
        answer = self.ask({**request, "fault": None if fault is None else asdict(fault)})
        return Child(answer["pid"], log, self)

    def ask(self, request: dict[str, object]) -> dict[str, object]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the zygote has ended with {self._process.wait()}")
        return json.loads(line)


class Spawned:
    """The command as a user starts it, imports and all."""

    def __init__(self, directory: Path, method: str = "snapshot") -> None:
        self.log = directory.with_name(f"{directory.name}.log")
        with self.log.open("a") as log:
            self._printed = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "snapcore", *arguments(directory, method)],
                **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log},
                cwd=directory.parent,
                env=environment(),
            )

    def begin(self) -> None:
        """Wait until the imports are done and the run says what it is."""
        while self.log.stat().st_size == self._printed and self._process.poll() is None:
            time.sleep(_GLANCE)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text()


def finished(child: Child | Spawned) -> None:
    """Wait for a command that is to succeed."""
    code = child.wait()
    if code != 0:
        raise AssertionError(f"the command ended with {code}:\n{child.output}")


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(_GLANCE)


def place(directory: Path) -> str:
    """Say where a killed run was, by what it has left on disk."""
    if not (directory / MANIFEST).exists():
        return "before the manifest"
    store = SnapshotStore(directory)
    signs = {
        ENDED: (directory / "results.json").exists(),
        "after the last manifest, before results.json": store.stopped is not None,
        "while a file was written": any(directory.rglob(".tmp*")),
        "between a member's file and the manifest": len(list(directory.glob("snapshot-*"))) > len(store.members),
        "before the first resume point": not (directory / POINT).exists(),
        f"in training, {len(store.members)} of 3 members taken": True,
    }
    return next(name for name, seen in signs.items() if seen)


def assert_same(directory: Path, reference: Path) -> None:
    """Compare two runs file by file, byte by byte; of `results.json` all but the seconds and the digest of them."""
    found, wanted = _files(directory), _files(reference)
    if found.keys() != wanted.keys():
        raise AssertionError(f"{directory} has {sorted(found)}, the undisturbed run has {sorted(wanted)}")
    different = [name for name in wanted if found[name] != wanted[name]]
    if different:
        raise AssertionError(f"in {directory} these are not as in the undisturbed run: {', '.join(different)}")


def _files(directory: Path) -> dict[str, object]:
    files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.name != ".lock"}
    content: dict[str, object] = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    content |= {name: "a directory" for name, path in files.items() if path.is_dir()}
    if "results.json" in content:
        content["results.json"] = {**json.loads(content["results.json"]), "seconds": None, "sha256": None}
    return content


__all__ = ["HOLD", "MANIFEST", "SLOW", "Child", "Fault", "Spawned", "Zygote", "assert_same", "finished", "place"]
