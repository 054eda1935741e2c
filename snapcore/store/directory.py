"""A run directory: one safetensors file per member and one manifest, `snapcore.json`.

A member's file is complete on disk before the manifest names it. So a reader finds the members that the manifest names,
each whole, or an error that names the damaged file. One process writes and any number read; nothing that the manifest
names is overwritten.
"""

import copy
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
from numpy.typing import ArrayLike

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store import resume_point
from snapcore.store.atomic import run_file, sweep
from snapcore.store.files import local_path, refuse_link
from snapcore.store.lock import DirectoryLock
from snapcore.store.manifest import (
    MANIFEST,
    Manifest,
    Member,
    describes,
    entry,
    format_manifest,
    has_index,
    new_member,
    read_manifest,
)
from snapcore.store.resume_point import ResumePoint
from snapcore.store.sealed import to_plain
from snapcore.store.tensor_file import TensorFile, host_arrays, open_tensors, refuse_foreign, write_tensors
from snapcore.store.tensors import Array

_KEY = "snapcore"
_MEMBER_FILE = re.compile(r"snapshot-\d{3,}\.safetensors")


class SnapshotStore:
    """Open a run directory to read its members or to add some.

    Arguments:
        path: the directory.
        mode: `"r"` reads, creates nothing and takes no lock; the files may be links, as in the caches of model hubs.
            `"w"` creates the directory or continues what is there, and holds the directory's lock until `close`.

    Raises:
        StoreError: mode `"r"` and there is no run; mode `"w"` and another writer holds the lock, the directory is not
            writable, or one of its files is a link; or another version of snapcore wrote it.
        CorruptSnapshotError: the manifest is damaged, or missing although there are members' files.

    Example:
        >>> import tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as directory, SnapshotStore(directory, "w") as store:
        ...     member = store.save({"w": numpy.ones(3)}, index=1, step=9, cycle=0, lr=0.1, framework="numpy")
        ...     member.file, store.load(1)["w"].sum()
        ('snapshot-001.safetensors', np.float64(3.0))
    """

    def __init__(self, path: str | os.PathLike[str], mode: Literal["r", "w"] = "r") -> None:
        if mode not in ("r", "w"):
            raise StoreError(f"mode must be 'r' or 'w', got {mode!r}")
        self._path = local_path(path)
        # One process writes, but two of its threads do: the writer's adds members while the loop's describes the run.
        self._turn = threading.Lock()
        self._lock: DirectoryLock | None = None
        if mode == "r":
            self._manifest = read_manifest(self._path, follow=True)
            return
        self._lock = DirectoryLock(self._path)
        try:
            self._prepare(self._lock)
        except BaseException:
            self._lock.release()
            raise

    @property
    def path(self) -> Path:
        """The run directory's absolute path."""
        return self._path

    @property
    def members(self) -> tuple[Member, ...]:
        """The members by index: those in the manifest when it was opened, and those added since."""
        return self._manifest.members

    @property
    def program(self) -> dict[str, Any] | None:
        """A copy of the program that `describe` recorded, or None."""
        return copy.deepcopy(self._manifest.program)

    @property
    def stopped(self) -> str | None:
        """Why the run stopped, or None while it has not."""
        return self._manifest.stopped

    def describe(self, *, program: dict[str, Any] | None = None, stopped: str | None = None) -> None:
        """Record the program, or why the run stopped; what is None stays as it is.

        Arguments:
            program: plain JSON, such as a program's `to_dict()`.
            stopped: why the run stopped.

        Raises:
            StoreError: the store is closed or only reads, `program` is not plain JSON, or the manifest cannot be
                written; it is then unchanged.
        """
        changes: dict[str, Any] = {}
        if program is not None:
            changes["program"] = to_plain(program, "program")
        if stopped is not None:
            changes["stopped"] = stopped
        with self._writing() as lock:
            self._write(msgspec.structs.replace(self._manifest, **changes), lock)

    def save(
        self,
        tensors: Mapping[str, ArrayLike],
        *,
        index: int,
        step: int,
        cycle: int,
        lr: float,
        framework: str,
        due: int | None = None,
        unfinished: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> Member:
        """Write a member: its file first, the manifest last, both flushed to disk.

        The same as `add(put(tensors, new_member(index=index, …)))`, which say what each argument is.

        Returns:
            The member as it is in the manifest.

        Raises:
            StoreError: the store is closed or only reads, the index exists, a value or a tensor cannot be stored, or
                the disk refuses; the members before are unchanged.
        """
        member = new_member(
            index=index,
            step=step,
            cycle=cycle,
            lr=lr,
            framework=framework,
            due=due,
            unfinished=unfinished,
            metrics=metrics,
        )
        written = self.put(tensors, member)
        self.add(written)
        return written

    def put(self, tensors: Mapping[str, ArrayLike], member: Member) -> Member:
        """Write a member's file, which no reader sees before `add`.

        Between the two a caller can write what must not be older than the manifest, such as a resume point.

        Arguments:
            tensors: the weights by name. Arrays of any shape and layout, of a type that safetensors and NumPy both
                have (bfloat16 is `ml_dtypes.bfloat16`). They must not change meanwhile. Those that share memory, such
                as tied weights, are written once, under the first of their names.
            member: from `new_member`.

        Returns:
            The member with its file's SHA-256.

        Raises:
            StoreError: the store is closed or only reads, the index exists, a tensor cannot be stored, there is another
                file of that name, or the disk refuses; the members before are unchanged.
        """
        if not tensors:
            raise StoreError("a snapshot needs at least one tensor, got none; pass the model's named arrays")
        arrays = host_arrays(tensors)
        path = self._path / member.file
        with self._writing() as lock:
            self._check_is_new(member)
            # A run that was killed before its manifest named the member has left this file, and writes it again.
            refuse_foreign(path, lambda metadata: has_index(metadata.get(_KEY, ""), member.index))
            with run_file(path, sum(array.nbytes for array in arrays.values()), check=lock.check) as temporary:
                sha256 = write_tensors(temporary, arrays, {_KEY: entry(member)})
        return msgspec.structs.replace(member, sha256=sha256)

    def add(self, member: Member, *, stopped: str | None = None) -> None:
        """Add a member to the manifest, once `put` has written its file.

        Arguments:
            member: what `put` returned.
            stopped: why the run stopped, if this is its last member.

        Raises:
            StoreError: the store is closed or only reads, the index exists, or the manifest cannot be written.
        """
        with self._writing() as lock:
            self._check_is_new(member)
            manifest = self._manifest.with_member(member)
            self._write(manifest if stopped is None else msgspec.structs.replace(manifest, stopped=stopped), lock)

    def truncate(self, count: int) -> None:
        """Keep the first `count` members and delete the others; the run counts as unfinished again.

        Raises:
            StoreError: the store is closed or only reads, or the disk refuses.
        """
        with self._writing() as lock:
            kept, forgotten = self.members[:count], self.members[count:]
            # The manifest first: killed in between, files that nothing names are left, not names without files.
            self._write(msgspec.structs.replace(self._manifest, members=kept, stopped=None), lock)
            for member in forgotten:
                lock.check()
                try:
                    (self._path / member.file).unlink(missing_ok=True)
                except OSError as error:
                    raise StoreError(f"{self._path}: a forgotten member cannot be deleted: {error}") from error

    def write_point(self, point: ResumePoint) -> None:
        """Replace the resume point; the old one stays until the new one is on disk.

        Raises:
            StoreError: the store is closed or only reads, the point cannot be written, or its state is not what
                `ResumePoint` says; the old one is unchanged.
        """
        with self._writing() as lock:
            resume_point.write_point(self._path, point, check=lock.check)

    def read_point(self) -> ResumePoint | None:
        """Return the resume point after checking it, or None if there is none.

        Raises:
            StoreError: it cannot be read, or another version of snapcore wrote it.
            CorruptSnapshotError: it is damaged.
        """
        return resume_point.read_point(self._path)

    def clear_point(self) -> None:
        """Delete the resume point, which a finished run no longer needs.

        Raises:
            StoreError: the store is closed or only reads, or it cannot be deleted.
        """
        with self._writing():
            resume_point.clear_point(self._path)

    def file(self, index: int, *, verify: bool = True) -> Path:
        """Return the path of a member's file after checking it.

        Arguments:
            index: the member's number.
            verify: whether to compare its SHA-256, which reads the whole file. That of a link is always compared.

        Raises:
            StoreError: there is no such member, or its file cannot be read.
            CorruptSnapshotError: the file is missing, not a whole safetensors file, another member's, or altered.
        """
        with self._open(index) as (path, member, opened):
            if verify or path.is_symlink():
                _compare(path, member, opened.sha256())
        return path

    def load(self, index: int, *, verify: bool = True) -> dict[str, Array]:
        """Read a member's tensors.

        Arguments:
            index: the member's number.
            verify: True compares the SHA-256 and returns writable arrays in memory. False maps the file read-only, so
                that only what is used is read.

        Returns:
            Arrays by name, with the shapes and types that were saved; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            StoreError, CorruptSnapshotError: see `file`.
        """
        with self._open(index) as (path, member, opened):
            if verify:
                tensors, sha256 = opened.read()
                _compare(path, member, sha256)
                return tensors
            if path.is_symlink():
                _compare(path, member, opened.sha256())
            return opened.map()

    def verify(self) -> None:
        """Check every member's file against the manifest.

        Raises:
            CorruptSnapshotError: naming the first file that is damaged.
        """
        for member in self.members:
            self.file(member.index)

    def close(self) -> None:
        """Free the lock. Members can still be read, but nothing can be written; closing twice is allowed."""
        if self._lock is not None and self._lock.is_ours:
            with self._turn:  # not in the middle of another thread's write
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[DirectoryLock]:
        """Let one thread write, if the directory is held and still where it was."""
        if self._lock is None:
            raise StoreError(f"{self._path} is open to read; open it with mode='w' to write")
        self._lock.check_process()  # before the turn, which a fork may have copied while another thread had it
        with self._turn:
            self._lock.check()
            yield self._lock

    def _prepare(self, lock: DirectoryLock) -> None:
        """Delete what killed writers left, and read the manifest, or start it if there is none."""
        folder = self._path / resume_point.FOLDER
        for path in (self._path / MANIFEST, folder, folder / resume_point.FILE):
            refuse_link(path)
        try:
            sweep(self._path)
            sweep(folder)
            started = (self._path / MANIFEST).exists()
            members = [path.name for path in self._path.iterdir() if _MEMBER_FILE.fullmatch(path.name)]
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error.strerror or error}") from error
        if started:
            self._manifest = read_manifest(self._path)
            for member in self.members:
                refuse_link(self._path / member.file)
        elif members:  # a new manifest would number its members from 1, and overwrite these
            raise CorruptSnapshotError(f"{self._path / MANIFEST} is missing beside {min(members)}; restore it")
        else:
            self._write(Manifest(), lock)

    def _write(self, manifest: Manifest, lock: DirectoryLock) -> None:
        path, data = self._path / MANIFEST, format_manifest(manifest)
        with run_file(path, len(data), check=lock.check) as temporary:
            temporary.write_bytes(data)
        self._manifest = manifest

    @contextmanager
    def _open(self, index: int) -> Iterator[tuple[Path, Member, TensorFile]]:
        """Find and open a member's file, check its header, and name the file in whatever goes wrong."""
        member = next((member for member in self.members if member.index == index), None)
        if member is None:
            indexes = [member.index for member in self.members]
            raise StoreError(f"{self._path} has no member {index!r}; there are {indexes}")
        path = self._path / member.file
        try:
            # Where a run is written links are refused; where it is only read, its SHA-256 says what a link leads to.
            with open_tensors(path, follow=self._lock is None) as opened:
                if not describes(opened.metadata.get(_KEY, ""), member):
                    raise ValueError("it does not describe itself as the manifest does; one was altered or swapped")
                yield path, member, opened
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptSnapshotError(f"{path} is missing; restore it, or leave member {index} out") from error

    def _check_is_new(self, member: Member) -> None:
        if any(member.index == other.index for other in self.members):
            raise StoreError(f"{self._path} has member {member.index}; nothing is overwritten: use another index")


def _compare(path: Path, member: Member, sha256: str) -> None:
    if sha256 != member.sha256:
        raise CorruptSnapshotError(
            f"{path} does not have the SHA-256 that was recorded; restore the file, or leave member {member.index} out"
        )
