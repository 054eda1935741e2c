"""One case: a fresh run, one attack, every reader, and whether each has refused it or read what is there."""

import random
import shutil
import time
import traceback
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from snapcore.errors import SnapcoreError

from .attacks import ATTACKS, Attack
from .doors import DOORS, STORE
from .oracle import SAID, is_a_history, same
from .run import HISTORY, PLAN, make


class Hanging(BaseException):
    """Raised in a reader that does not come back; no `except Exception` on the way keeps it."""


class Outcome(NamedTuple):
    """What came of a case: whether a reader refused the run, how long the slowest took, and what was wrong."""

    refused: bool
    seconds: float
    wrong: str = ""


class Runs:
    """The runs that are attacked, in a folder with files of somebody's beside them.

    Arguments:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        (folder / "folder").mkdir()
        for path in (folder / "mine", folder / "folder" / "mine"):
            path.write_text("mine")
        self.whole, self.truth = [], []
        for updates in (45, 40):
            make(self.run, updates=updates)
            files = [path for path in self.run.rglob("*") if path.is_file()]
            self.whole.append({path.relative_to(self.run): path.read_bytes() for path in files})
            self.truth.append({door: door(self.run) for door in (*chain(*DOORS.values()), *STORE)})
            self.clear()

    def attack(self, seed: int, number: int) -> Outcome:
        """Do a case again, whichever were done before."""
        attack, rng, which = ATTACKS[number % len(ATTACKS)], random.Random(f"{seed} {number}"), number % 2
        for name, content in self.whole[which].items():
            (self.run / name).parent.mkdir(parents=True, exist_ok=True)
            (self.run / name).write_bytes(content)
        attack.do(self.run, attack.name, rng)
        refused, slowest, wrong = False, 0.0, ""
        doors = DOORS.get(attack.name, STORE) if attack.name else (*chain(*DOORS.values()), *STORE)
        for door in doors:
            began = time.perf_counter()
            try:
                value = door(self.run)
            except (Exception, Hanging) as error:  # noqa: BLE001  what is not ours is what is looked for
                value = error
            slowest = max(slowest, time.perf_counter() - began)
            if isinstance(value, SnapcoreError):
                refused = True
            elif wrong := self._wrong(attack, door.__name__, value, self.truth[which][door]):
                break
        wrong = wrong or self._touched(attack)
        self.clear()
        return Outcome(refused, slowest, wrong and f"{door.__name__}: {wrong}")

    def clear(self) -> None:
        """Take the run away, wherever it is."""
        by_a_link = [path for path in (self.folder / "folder").iterdir() if path.name != "mine"]
        for path in (self.run, self.run.with_name("run.1"), *by_a_link):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _wrong(self, attack, door, value, truth) -> str:
        """Say what is wrong with what a reader returned or raised; nothing if it is right."""
        if isinstance(value, BaseException):
            return "".join(traceback.format_exception(value))
        if value == truth or (attack.how == "replaced by no file" and value in (None, [])):
            return ""
        if door == "resumed" and attack.name == "":
            right = value["step"] == 0  # a run of its own
        elif door == "described":
            right = attack.forged or bool(value[1])
        elif door == "ours":
            right = value <= {attack.name, HISTORY} or attack.name == ""
        elif door == "history":
            right = is_a_history(value, PLAN.schedule)
        elif attack.forged:
            right = door not in SAID or same(value, SAID[door](self.run))
        else:
            right = False
        return "" if right else f"it read {str(value)[:500]}\n  in place of {str(truth)[:500]}"

    def _touched(self, attack: Attack) -> str:
        """Say which file beside the run was written or deleted; nothing if none was."""
        names = {path.name for path in self.folder.iterdir()} - {"run", "run.1"}
        mine = [path.read_text() for path in (self.folder / "mine", self.folder / "folder" / "mine")]
        within = [path.name for path in (self.folder / "folder").iterdir()]
        # A run's own path may be a link, and then its files go where that leads.
        whole = names == {"mine", "folder"} and mine == ["mine", "mine"] and (within == ["mine"] or attack.name == "")
        return "" if whole else f"files beside the run are not as they were: {names}, {mine}, {within}"
