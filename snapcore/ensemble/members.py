"""Which files an ensemble is made of: the last finished members of one run, or of several."""

import os
from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from pathlib import Path

from snapcore.ensemble.recipe import Recipe, as_recipe
from snapcore.errors import CorruptSnapshotError, DataError, StoreError
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


def refuse_mapped(mapped: bool) -> None:
    """Refuse weights that stay in their files where the framework has to copy them to its devices.

    Raises:
        DataError: they are asked for.
    """
    if mapped:
        raise DataError("mapped=True is for PyTorch alone: this framework copies weights to its devices; leave it out")


def member_files(
    directories: Directory | Iterable[Directory],
    *,
    framework: str | Sequence[str],
    last: int | None = None,
    members: Iterable[int] | None = None,
) -> list[Path]:
    """Return the paths of members' files, each checked against its digest; files that are not chosen are not read.

    Arguments:
        directories: a run directory, or several.
        framework: that must have written them; or several, the adapter's own first.
        last: how many members of each run, counted from its end; default all. Unfinished ones are left out.
        members: instead, the indices of each run's members to take, in this order; an unfinished one is taken too.

    Raises:
        StoreError: a directory holds no run, no finished member, or not the members asked for.
        CorruptSnapshotError: a file is not what was written.
        DataError: a member was written by another framework, or `last` and `members` are both given.
    """
    own, *others = [framework] if isinstance(framework, str) else framework
    chosen = None if members is None else list(members)
    if chosen is not None and last is not None:
        raise DataError(f"either last or members must be left out, got last={last} and members={chosen}")
    if chosen is not None and (not chosen or len(set(chosen)) < len(chosen)):
        raise DataError(f"members must be different indices, at least one, got {chosen}")
    paths = [directories] if isinstance(directories, str | os.PathLike) else list(directories)
    files = []
    for path in map(Path, paths):
        store = SnapshotStore(path)
        wanted = _wanted(store, path, last) if chosen is None else chosen
        by_index = {member.index: member for member in store.members}
        for index in wanted:
            if index not in by_index:
                raise StoreError(f"members must be among those of {path}, {[*by_index]}; got {index!r}")
            if (writer := by_index[index].framework) not in (own, *others):
                raise DataError(
                    f"member {index} of {path} was written by {writer}, not by {own}: load it with snapcore_{writer}, "
                    "and average the probabilities with snapcore.ensemble.combine"
                )
        for index in wanted:
            try:
                files.append(store.file(index))
            except CorruptSnapshotError as error:
                rest = [other for other in wanted if other != index]
                if not rest or by_index[index].file not in str(error):
                    raise
                raise CorruptSnapshotError(f"{error} (members={rest} leaves it out)") from error
    return files


def recipe_files(
    directories: Directory | Iterable[Directory],
    recipe: Recipe | Directory | None,
    *,
    framework: str | Sequence[str],
    last: int | None = None,
    members: Iterable[int] | None = None,
) -> tuple[list[Path], Recipe | None]:
    """Return the paths of the members that a recipe gives a weight, and the recipe for these alone.

    Arguments:
        directories: a run directory, or several; their finished members are the recipe's.
        recipe: or the path of its file; without one, see `member_files`.
        framework: as for `member_files`.
        last: left out where there is a recipe, which names the members; as for `members`.
        members: the same.

    Raises:
        StoreError, CorruptSnapshotError: as for `member_files`, or the recipe cannot be read.
        DataError: the recipe is for other members than these, or they have changed since.
    """
    if recipe is None:
        return member_files(directories, framework=framework, last=last, members=members), None
    if last is not None or members is not None:
        raise DataError("last and members must be left out where there is a recipe: it says which members are used")
    wanted = as_recipe(recipe)
    paths = [directories] if isinstance(directories, str | os.PathLike) else list(directories)
    found = [(path, member) for path in paths for member in SnapshotStore(path).members if not member.unfinished]
    digests = [member.sha256 for _, member in found]
    if wanted.members is None and len(wanted.weights) != len(found):
        raise DataError(
            f"the recipe is for {len(wanted.weights)} members, and there are {len(found)}: give its own runs"
        )
    used = [
        (weight, digest) for weight, digest in zip(wanted.weights, wanted.members or digests, strict=True) if weight
    ]
    lacking = [digest for _, digest in used if digest not in digests]
    if lacking:
        raise DataError(
            f"the recipe is for members that are not in {', '.join(map(str, paths))}, or have changed since: give its "
            "own runs, or fit it anew"
        )
    files = []
    for _, digest in used:
        path, member = found[digests.index(digest)]
        files += member_files(path, framework=framework, members=[member.index])
    weights, names = zip(*used, strict=True)
    return files, replace(wanted, weights=weights, members=names)


def _wanted(store: SnapshotStore, path: Path, last: int | None) -> list[int]:
    finished = [member.index for member in store.members if not member.unfinished]
    if not finished:
        raise StoreError(f"{path} holds no finished member: train until the first cycle ends")
    count = len(finished) if last is None else last
    if not 1 <= count <= len(finished):
        raise StoreError(f"last must be in 1..{len(finished)}, the finished members of {path}; got {last}")
    return finished[-count:]
