"""Opening a run directory to write: what may be resumed there, what is refused, and what is read back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.protocol import Program
from snapcore.run.saving import WEIGHTS, State
from snapcore.run.trainer import Position
from snapcore.store import (
    MANIFEST,
    ResumePoint,
    SnapshotStore,
    Tensors,
    move_aside,
    read_point,
)

_INSTEAD = "choose another directory, or pass resume=False, which moves it aside and starts anew"


def open_run(
    directory: Path, program: Program, framework: str, *, resume: bool = True, at: Position | None = None
) -> SnapshotStore:
    """Open a run directory to write, once all that it holds agrees.

    Arguments:
        directory: the run's own.
        program: what is walked.
        framework: who writes.
        resume: False moves a run that is there aside.
        at: where a trainer that keeps checkpoints of its own starts or resumes.

    Returns:
        The directory, whose lock is held.

    Raises:
        StoreError, CorruptSnapshotError: see `Recorder`.
    """
    described = program.to_dict()  # what cannot be kept is refused before the disk is touched
    resumed_elsewhere = at is not None and at.step > 0
    if not resume and not resumed_elsewhere and (directory / MANIFEST).exists():
        move_aside(directory)
    store = SnapshotStore(directory, "w")
    try:
        if store.program is None and not store.members:
            if store.read_point() is not None:
                raise CorruptSnapshotError(
                    f"{directory} has a resume point, but {MANIFEST} knows of no run: restore that, or choose another "
                    "directory"
                )
            store.describe(program=described)
        if store.stopped is not None and not resumed_elsewhere:
            store.clear_point()  # a kill may have come between the manifest and this
            held = f"a run that is {store.stopped} ({len(store.members)} members)"
            raise StoreError(f"{directory} holds {held}: load it with SnapshotEnsemble.load, {_INSTEAD}")
        if store.program != program.to_dict():
            raise StoreError(f"{directory} holds an unfinished run of another program: {_INSTEAD}")
        point = store.read_point()
        if at is not None:
            _accept_position(store, program, at, point)
        elif point is not None:
            _accept_point(store, framework, point)
        elif store.members:
            held = f"an unfinished run without a resume point ({len(store.members)} members)"
            raise StoreError(f"{directory} holds {held}: {_INSTEAD}")
    except BaseException:
        store.close()
        raise
    return store


def read_resumed(directory: Path) -> tuple[Tensors, State] | None:
    """Return what the newest resume point holds, its member's weights among it; None if there is no point.

    Raises:
        StoreError, CorruptSnapshotError: it cannot be read, or is not what was written.
    """
    point = read_point(directory)
    if point is None:
        return None
    if point.member is None:
        return point.tensors, point.state
    weights = SnapshotStore(directory).load(point.member.index)
    return {**point.tensors, **{WEIGHTS + name: array for name, array in weights.items()}}, point.state


def differing_settings(
    directory: Path, saved: Mapping[str, Any], given: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Return each setting that is not the saved run's: its name, as it was, and as it is given.

    Raises:
        StoreError: another optimizer is given.
    """
    if "optimizer" in saved and given.get("optimizer", saved["optimizer"]) != saved["optimizer"]:
        raise StoreError(
            f"{directory} holds a run trained by {saved['optimizer']}, got {given['optimizer']}: give that "
            "optimizer, or choose another directory"
        )
    return [(name, was, given[name]) for name, was in saved.items() if name in given and given[name] != was]


def last_step(directory: Path, count: int) -> int:
    """Return the update after which the last of the first `count` members was taken; 0 for none."""
    members = SnapshotStore(directory).members[:count]  # process 0 may be adding one already
    return members[-1].step if members else 0


def _accept_position(store: SnapshotStore, program: Program, at: Position, point: ResumePoint | None) -> None:
    if point is not None:
        raise StoreError(
            f"{store.path} holds a run with resume points of its own, not in a trainer's checkpoint: resume it as it "
            "was started, or choose another directory"
        )
    if at.members != tuple(member.sha256 for member in store.members[: len(at.members)]):
        raise StoreError(
            f"{store.path} does not hold the {len(at.members)} members that the trainer's checkpoint after update "
            f"{at.step} counts: give the directory and the checkpoint of one training"
        )
    if at.step == 0 and store.members:
        raise StoreError(
            f"{store.path} holds an unfinished run ({len(store.members)} members), and the trainer starts at update 0: "
            "have it resume from its checkpoint, choose another directory, or pass resume=False"
        )
    if 0 < at.step < program.updates or len(at.members) < len(store.members):
        store.truncate(len(at.members))


def _accept_point(store: SnapshotStore, framework: str, point: ResumePoint) -> None:
    if point.state["framework"] != framework:
        raise StoreError(
            f"{store.path} holds a run of {point.state['framework']}: resume it with that, or choose another directory"
        )
    indexes = [member.index for member in store.members]
    if point.member is not None and point.member.index not in indexes:  # killed between the point and the manifest
        store.add(point.member)
        indexes.append(point.member.index)
    taken = point.state["place"]["taken"]
    if indexes != list(range(1, taken + 1)):
        raise CorruptSnapshotError(
            f"{store.path} has members {indexes}, but its resume point counts {taken}: restore what is missing, or "
            "choose another directory"
        )
