"""The writer's side of a run: copies become files, in an order that survives a kill at any instant.

All files are written by the thread of `SnapshotWriter`, one job after the other, while the loop trains on. Nothing
here knows a framework: a job resolves its copy to host arrays, checks them, and writes them through the store.

At the end of a cycle three files change, and a kill may come between any two of them:

1. the member's file, which nothing names yet;
2. the resume point, which counts the member and refers to its file for the weights;
3. the manifest, which names the member to every reader.

Killed before 2, the run resumes from the point before, does the rest of the cycle again and writes the same file
again. Killed between 2 and 3, the point knows of a member that the manifest lacks, and `open_run` adds it. So a reader
sees whole members only, and no member is ever newer than the point to resume from. In any other order a kill could
leave a member in the manifest that the resumed run would take a second time, or a point that counts a lost file.

When the program ends, the manifest says so first and the resume point goes after: a kill in between leaves a point
that nobody needs, which is deleted when the directory is opened. The other way round it would leave a run that is
neither finished nor resumable.

Once a job has failed, no later one is done: a point or a manifest written after a lost member would count it.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snapcore.backend import Pending, resolved
from snapcore.errors import ProtocolError, StoreError
from snapcore.protocol import Snapshot, Stop
from snapcore.run.background import SnapshotWriter
from snapcore.store import (
    ResumePoint,
    SnapshotStore,
    Tensors,
    check_finite,
    host_arrays,
    new_member,
    non_finite,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTS = "weights/"
"""What the names of a dump's weights begin with; the other tensors are the optimizer's and the like."""

Copy = Pending | Tensors
State = dict[str, Any]


class Saving:
    """Write what a loop has copied: members, resume points, and why the run ended.

    Arguments:
        store: the run directory, open to write and holding its lock; None in a process that leaves the writing to
            another, where every request is ignored.
        directory: the run's own.
        framework: recorded with every member.
    """

    def __init__(self, store: SnapshotStore | None, directory: Path, framework: str) -> None:
        self._store, self._directory, self._framework = store, directory, framework
        self._constants: dict[str, NDArray[Any]] = {}  # what is not finite before the first update
        self.failed = False
        """Whether a job has failed, so that nothing is written any more."""
        # The thread frees the lock when it ends, not the loop: whatever interrupts the loop's wait for the writer, the
        # directory is not another's while a file of this run may still be written.
        self._writer = SnapshotWriter(at_end=None if store is None else store.close)

    @property
    def store(self) -> SnapshotStore:
        """The run directory, open to write.

        Raises:
            ProtocolError: another process writes.
        """
        if self._store is None:
            raise ProtocolError("only process 0 writes the run directory; read it with SnapshotStore(path)")
        return self._store

    def digests(self) -> tuple[str, ...]:
        """Return the SHA-256 of each member that is on disk."""
        return () if self._store is None else tuple(member.sha256 for member in self._store.members)

    def first_member(self) -> Tensors:
        """Return the weights of the run's first member, which must be on disk."""
        return SnapshotStore(self._directory).load(1)

    def rehearse(self, copy: Copy, values: Mapping[str, Any], *, dumped: bool, first: bool) -> None:
        """Refuse what could not be saved, before training costs anything.

        Values that are not finite before the first update are remembered: as long as training does not change them,
        they are meant so, such as a mask's −inf or the bound of a constraint.

        Raises:
            StoreError: a name, a type or a value that a file cannot hold, or a disk without room for one member.
        """
        tensors = resolved(copy)
        host_arrays(tensors)
        try:
            json.dumps(values, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StoreError(f"a dump's values must be plain JSON: {error}; return arrays as tensors") from error
        weights = _weights(tensors) if dumped else tensors
        if first:
            self._constants = {name: np.array(weights[name]) for name in non_finite(weights)}
        needed = sum(array.nbytes for array in weights.values())
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise StoreError(f"{self._directory} has {free} bytes free, and a member needs {needed}: make room first")

    def reserve(self) -> None:
        """Wait until there is room for one more copy, so that at most two exist however slow the disk is."""
        self._writer.reserve()

    def member(
        self,
        snapshot: Snapshot,
        metrics: Mapping[str, float] | None,
        copy: Copy,
        state: State | None,
        stop: Stop | None,
    ) -> None:
        """Write a member, the resume point that belongs to it, and the program's end if it is the last.

        Arguments:
            snapshot: what is due.
            metrics: recorded with the member.
            copy: the weights alone, or with `state` a dump, whose weights are named `weights/…`.
            state: of the resume point; None if there is to be none.
            stop: why the program ends with this member, or None.
        """

        def write() -> None:
            tensors = resolved(copy)
            weights = tensors if state is None else _weights(tensors)
            self._check_finite(weights, f"member {snapshot.index} at update {snapshot.step}")
            member = new_member(**asdict(snapshot), framework=self._framework, metrics=metrics)
            member = self.store.put(weights, member)
            if state is not None:
                # The weights are in the member's file already: the point holds the rest, and refers to it.
                rest = {name: array for name, array in tensors.items() if not name.startswith(WEIGHTS)}
                self.store.write_point(ResumePoint(rest, state, member))
            self.store.add(member, stopped=None if stop is None else stop.reason)
            if stop is not None:
                self.store.clear_point()

        self._submit(write)

    def point(self, copy: Copy, state: State) -> None:
        """Write a resume point in the middle of a cycle, weights and all."""

        def write() -> None:
            tensors = resolved(copy)
            self._check_finite(_weights(tensors), f"the resume point at update {state['place']['step']}")
            self.store.write_point(ResumePoint(tensors, state))

        self._submit(write)

    def amend(self, step: int, processes: list[Any]) -> None:
        """Replace the random states and the positions in the data of the newest point, if it is of that update."""

        def write() -> None:
            point = self.store.read_point()
            if point is not None and point.state["place"]["step"] == step:
                self.store.write_point(replace(point, state={**point.state, "processes": processes}))

        self._submit(write)

    def stopped(self, stop: Stop) -> None:
        """Record why the run ended where no member is taken at its end."""

        def write() -> None:
            self.store.describe(stopped=stop.reason)
            self.store.clear_point()

        self._submit(write)

    def check(self) -> None:
        """Raise what a job has raised; once that is known, refuse the run any further update.

        Raises:
            StoreError, DivergedError: a member or a resume point could not be written or was refused.
            ProtocolError: the same, after its own error was raised.
        """
        self._writer.check()
        if self.failed:
            self._writer.drain()  # the error itself, if the thread has noted the failure and not yet handed it over
            raise ProtocolError(
                f"a member of {self._directory} could not be written, and this run cannot continue without it: start "
                "again to resume from the point before"
            )

    def drain(self) -> None:
        """Wait until all that was submitted is on disk, and raise what a job has raised."""
        self._writer.drain()

    def close(self) -> None:
        """Finish what was submitted, free the directory, and raise what a job has raised."""
        self._writer.close()

    def _check_finite(self, weights: Tensors, what: str) -> None:
        unmoved = {
            name
            for name, array in self._constants.items()
            if name in weights and np.array_equal(weights[name], array, equal_nan=True)
        }
        check_finite(weights, what, constant=unmoved)

    def _submit(self, job: Callable[[], None]) -> None:
        if self._store is None:
            return

        def unless_failed() -> None:
            if self.failed:
                return
            try:
                job()
            except BaseException:
                self.failed = True
                raise

        self._writer.submit(unless_failed)


def _weights(tensors: Tensors) -> Tensors:
    weights = {name.removeprefix(WEIGHTS): array for name, array in tensors.items() if name.startswith(WEIGHTS)}
    if not weights:
        raise ProtocolError(f"a dump must name its weights {WEIGHTS}<name>, as rule 14 says; got {sorted(tensors)[:5]}")
    return weights
