"""Opening a run directory to write: what may go on there, and what is refused."""

from dataclasses import dataclass
from pathlib import Path

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.protocol import Program
from snapcore.run.trainer import Place
from snapcore.store import MANIFEST, ResumePoint, SnapshotStore, clear_point, move_aside, read_point

_INSTEAD = "choose another directory, or pass resume=False, which moves it aside and starts anew"


@dataclass(frozen=True)
class Opening:
    """A run that wants to be written.

    Arguments:
        directory: the run's own.
        program: what it walks.
        framework: who writes.
        at: where a trainer that keeps checkpoints of its own begins or goes on.
    """

    directory: Path
    program: Program
    framework: str
    at: Place | None = None

    def store(self, *, resume: bool) -> SnapshotStore:
        """Return the directory, open to write, once all that it holds agrees.

        Arguments:
            resume: False moves a run that is there aside.

        Raises:
            StoreError, CorruptSnapshotError: see `Recorder`.
        """
        if not resume and not self._goes_on and (self.directory / MANIFEST).exists():
            move_aside(self.directory)
        store = SnapshotStore(self.directory, "w")
        try:
            self._accept(store)
        except BaseException:
            store.close()
            raise
        return store

    @property
    def _goes_on(self) -> bool:
        return self.at is not None and self.at.step > 0

    def _accept(self, store: SnapshotStore) -> None:
        if store.program is None and not store.members:
            if read_point(self.directory) is not None:
                raise CorruptSnapshotError(
                    f"{self.directory} has a resume point, but {MANIFEST} knows of no run: restore that, or choose "
                    "another directory"
                )
            store.describe(program=self.program.to_dict())
        if store.stopped is not None and not self._goes_on:
            clear_point(self.directory)  # a kill may have come just before
            held = f"a run that is {store.stopped} ({len(store.members)} members)"
            raise StoreError(f"{self.directory} holds {held}: load it with SnapshotEnsemble.load, {_INSTEAD}")
        if store.program != self.program.to_dict():
            raise StoreError(f"{self.directory} holds an unfinished run of another program: {_INSTEAD}")
        point = read_point(self.directory)
        if self.at is not None:
            self._accept_place(store, self.at, point)
        elif point is not None:
            self._accept_point(store, point)
        elif store.members:
            held = f"an unfinished run without a resume point ({len(store.members)} members)"
            raise StoreError(f"{self.directory} holds {held}: {_INSTEAD}")

    def _accept_place(self, store: SnapshotStore, at: Place, point: ResumePoint | None) -> None:
        if point is not None:
            raise StoreError(
                f"{self.directory} holds a run that keeps resume points of its own, not in a trainer's checkpoint: go "
                "on with it as it began, or choose another directory"
            )
        if at.members != tuple(member.sha256 for member in store.members[: len(at.members)]):
            raise StoreError(
                f"{self.directory} does not hold the {len(at.members)} members that the trainer's checkpoint after "
                f"update {at.step} counts: give the directory and the checkpoint of one and the same training"
            )
        if at.step == 0 and store.members:
            raise StoreError(
                f"{self.directory} holds an unfinished run ({len(store.members)} members), and the trainer begins at "
                "update 0: have it go on from its checkpoint, choose another directory, or pass resume=False, which "
                "moves the run aside"
            )
        if 0 < at.step < self.program.updates or len(at.members) < len(store.members):
            store.truncate(len(at.members))

    def _accept_point(self, store: SnapshotStore, point: ResumePoint) -> None:
        if point.state["framework"] != self.framework:
            raise StoreError(
                f"{self.directory} holds a run of {point.state['framework']}: go on with that, or choose another "
                "directory"
            )
        indexes = [member.index for member in store.members]
        if point.member is not None and point.member.index not in indexes:  # killed between the point and the manifest
            store.add(point.member)
            indexes.append(point.member.index)
        taken = point.state["place"]["taken"]
        if indexes != list(range(1, taken + 1)):
            raise CorruptSnapshotError(
                f"{self.directory} has members {indexes}, but its resume point counts {taken}: restore what is "
                "missing, or choose another directory"
            )
