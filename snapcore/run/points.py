"""The loop's side of resume points: all that a run needs to resume is copied and handed over, and given back.

A point is what the source dumps, and what the source does not know: the settings in force, the position in the program
and in the data, and the random states of every process.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snapcore.backend import Pending
from snapcore.protocol import Cursor
from snapcore.run.batches import Epochs
from snapcore.run.group import Group
from snapcore.run.random_state import random_state, set_random_state
from snapcore.run.resume import differing_settings, read_resumed
from snapcore.run.saving import Saving, State
from snapcore.run.source import Source
from snapcore.store import Tensors

log = logging.getLogger("snapcore")


class ResumePoints:
    """Take the resume points of a run, and resume from the newest.

    Arguments:
        source: what is being trained.
        cursor: where the run is.
        saving: writes what is handed over.
        group: the processes that train together.
        directory: the run's own.
        framework: recorded with every point.
        before: called before every point, to bring what belongs to it up to date.
        kept: whether there are points at all; a trainer with checkpoints of its own needs none.
    """

    def __init__(
        self,
        source: Source,
        cursor: Cursor,
        saving: Saving,
        group: Group,
        *,
        directory: Path,
        framework: str,
        before: Callable[[], None] | None,
        kept: bool,
    ) -> None:
        self._source, self._cursor, self._saving, self._group = source, cursor, saving, group
        self._directory, self._framework, self._before, self.kept = directory, framework, before, kept
        self.epochs = Epochs(cursor, self.random_state, self._set_random_state, self.amend)
        """The position in the data."""
        self.newest = 0
        """The update that the newest point was taken after; 0 if there is none."""
        self._newest_random: Any = None
        self._closed = False

    def load(self, name: str) -> bool:
        """Resume from the newest point; return whether there is one.

        Arguments:
            name: of the run, for the log.

        Raises:
            StoreError: the run was trained by another optimizer.
            CorruptSnapshotError, DataError: the point cannot be read or does not fit.
        """
        resumed = read_resumed(self._directory)
        if resumed is None:
            return False
        tensors, state = resumed
        differing = differing_settings(self._directory, state.get("settings", {}), self._source.settings())
        self._cursor.load_state_dict(state["place"])
        self.newest = self._cursor.step
        self._source.load(tensors, state["values"])
        processes = state["processes"]
        own = processes[self._group.rank if len(processes) == self._group.size else 0]
        self.epochs.load_state_dict(own["data"])
        self._set_random_state(own["random"])
        log.warning("%s: resumed after update %d of %d", name, self._cursor.step, self._cursor.program.updates)
        if differing:
            now = self._source.settings()
            shown = "; ".join(f"{key} {was} saved, {is_} given, {now[key]} in force" for key, was, is_ in differing)
            log.warning("%s: settings differ from those of the saved run: %s", name, shown)
        return True

    def copy(self, random: Any = None) -> tuple[Pending | Tensors, State | None]:
        """Copy the weights, with all else that a point needs if there is to be one.

        Arguments:
            random: the random states that belong to it; None for those of this moment.
        """
        if not self.kept:
            return self._source.capture(), None
        if self._before is not None:
            self._before()
        random = random or self.random_state()
        processes = self._processes(random)
        dumped = self._source.dump()
        if dumped is None:
            return self._source.capture(), None
        tensors, values = dumped
        self.newest, self._newest_random, self.epochs.settled = self._cursor.step, random, False
        return tensors, {
            "framework": self._framework,
            "place": self._cursor.state_dict(),
            "values": values,
            "processes": processes,
            "settings": self._source.settings(),
        }

    def save(self, random: Any = None) -> None:
        """Write a point of this step now, unless there is one or nothing is left to resume."""
        if not self.kept or self._cursor.finished or self._cursor.step <= self.newest:
            return
        self._saving.reserve()
        copy, state = self.copy(random)
        if state is not None:
            self._saving.point(copy, state)

    def amend(self) -> None:
        """Keep the random states of this moment with a point that no update has followed; a batch is asked for.

        What a loop does between an update and the next batch, such as an evaluation, may draw random numbers, and a
        resumed run does not do it again.
        """
        if self._newest_random is None or self._closed or self.epochs.settled:
            return
        random = self.random_state()
        if any(self._group.gather(random != self._newest_random)):
            self._newest_random = random
            self._saving.amend(self._cursor.step, self._processes(random))

    def close(self) -> None:
        """Amend no point any more; one may still be saved."""
        self._closed = True

    def random_state(self) -> dict[str, Any]:
        """Return Python's, NumPy's and the framework's random states as plain JSON."""
        return {**random_state(), "framework": self._source.random_state()}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        set_random_state(state)
        self._source.set_random_state(state["framework"])

    def _processes(self, random: Any) -> list[Any]:
        return self._group.gather({"random": random, "data": self.epochs.state_dict()})
