"""The files that the command writes beside members, and how it recognises its own: a user's are never replaced."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from snapcore.errors import StoreError
from snapcore.lab.files import open_regular
from snapcore.lab.sealed import read_sealed

JOB = "job.json"
HISTORY = "history.csv"
PLOT = "training.png"
RESULTS = "results.json"
RECIPE = "recipe.json"
PLAN = "plan.json"
COMPARISON = "comparison.json"
DIVERSITY = "diversity.json"
DIVERSITY_PLOT = "diversity.png"

COLUMNS = ("step", "lr", "loss")
MAKER = "snapcore"
PICTURES = {
    ".png": ("Software", b"Software\0" + MAKER.encode()),
    ".svg": ("Creator", b"<dc:title>" + MAKER.encode() + b"</dc:title>"),
    ".pdf": ("Creator", b"/Creator (" + MAKER.encode() + b")"),
    ".eps": ("Creator", b"%%Creator: " + MAKER.encode()),
    ".ps": ("Creator", b"%%Creator: " + MAKER.encode()),
}
"""The formats of pictures that can name their maker: in which field, and how it then reads in the file."""

_HEAD = 2**20  # bytes that are looked at; a PDF names its maker at the end


def refuse_foreign(directory: Path, names: Iterable[str] = (JOB, HISTORY, PLOT, RESULTS)) -> None:
    """Raise `StoreError` if a file that would be replaced is none of ours."""
    for name in names:
        path = directory / name
        if os.path.lexists(path) and not is_ours(path):
            raise StoreError(f"{path} is not snapcore's, and is not replaced: move it, or choose another --output")


def is_ours(path: Path) -> bool:
    """Return whether a file, itself and not through a link, is one that the command wrote.

    A JSON file has its seal, a picture names its maker, and a table has its header and lies beside a sealed job.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        if path.suffix == ".json":
            read_sealed(path)
            return True
        with open_regular(path) as file:
            head = file.read(_HEAD)
    except OSError:  # altered, or not to be read: not known to be ours
        return False
    if path.suffix == ".csv":
        return head.startswith(",".join(COLUMNS).encode()) and is_ours(path.with_name(JOB))
    return path.suffix in PICTURES and PICTURES[path.suffix][1] in head
