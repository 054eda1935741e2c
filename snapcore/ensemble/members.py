"""Which files an ensemble is made of: the last finished members of one run, or of several."""

import os
from collections.abc import Iterable, Sized
from pathlib import Path

from snapcore.errors import DataError, StoreError
from snapcore.store import SnapshotStore

Directory = str | os.PathLike[str]


def check_members(members: Sized) -> None:
    """Check that there is a member.

    Raises:
        StoreError: there is none.
    """
    if not len(members):
        raise StoreError("an ensemble needs at least one finished member, got none")


def refuse_like(like: object) -> None:
    """Refuse `like` where a model is given, which has the structure of the weights.

    Raises:
        DataError: `like` is given too.
    """
    if like is not None:
        raise DataError(f"like must be left out: the model has the weights' structure; got {type(like).__name__}")


def member_files(
    directories: Directory | Iterable[Directory], *, framework: str, last: int | None = None
) -> list[Path]:
    """Return the paths of members' files in order, each checked against its digest.

    Arguments:
        directories: a run directory, or several.
        framework: that must have written them.
        last: how many members of each run, counted from its end; default all. Unfinished ones are left out.

    Raises:
        StoreError: a directory holds no run, or fewer than `last` finished members.
        CorruptSnapshotError: a file is not what was written.
        DataError: a member was written by another framework.
    """
    paths = [directories] if isinstance(directories, str | os.PathLike) else list(directories)
    files = []
    for path in map(Path, paths):
        store = SnapshotStore(path)
        finished = [member for member in store.members if not member.unfinished]
        for member in finished:
            if member.framework != framework:
                raise DataError(
                    f"member {member.index} of {path} was written by {member.framework}, not by {framework}: load it "
                    f"with snapcore_{member.framework}, and average the probabilities with snapcore.ensemble.combine"
                )
        if not finished:
            raise StoreError(f"{path} holds no finished member: train until the first cycle ends")
        count = len(finished) if last is None else last
        if not 1 <= count <= len(finished):
            raise StoreError(f"last must be in 1..{len(finished)}, the finished members of {path}; got {last}")
        files += [store.file(member.index) for member in finished[-count:]]
    return files
