"""A run directory: one safetensors file per member and one manifest, `snapcore.json`.

A member's file is complete on disk before the manifest names it. So a reader finds the members that the manifest names,
each whole, or an error that names the damaged file. One process writes and any number read; nothing that the manifest
names is overwritten.
"""

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
from filelock import BaseFileLock, FileLock, Timeout
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from snapcore.errors import CorruptSnapshotError, StoreError
from snapcore.store import atomic
from snapcore.store.manifest import (
    MANIFEST,
    Manifest,
    Member,
    describes,
    entry,
    file_name,
    format_manifest,
    is_sealed,
    new_member,
    plain,
    read_manifest,
    sealed,
)
from snapcore.store.tensors import Array, map_tensors, read_metadata, row_major

_KEY = "snapcore"


class SnapshotStore:
    """Open a run directory to read its members or to add some.

    Arguments:
        path: the directory.
        mode: `"r"` reads, creates nothing and takes no lock. `"w"` creates the directory or continues what is there,
            and holds the directory's lock until `close`.

    Raises:
        StoreError: mode `"r"` and there is no run; mode `"w"` and another writer holds the lock or the directory is not
            writable; or another version of snapcore wrote it.
        CorruptSnapshotError: the manifest is damaged, or missing although there are members' files.

    Example:
        >>> import tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as directory, SnapshotStore(directory, "w") as store:
        ...     member = store.save({"w": numpy.ones(3)}, index=1, step=9, cycle=0, lr=0.1, framework="numpy")
        ...     member.file, store.load(1)["w"].sum()
        ('snapshot-001.safetensors', np.float64(3.0))
    """

    def __init__(self, path: str | Path, mode: Literal["r", "w"] = "r") -> None:
        if mode not in ("r", "w"):
            raise StoreError(f"mode must be 'r' or 'w', got {mode!r}")
        self._path = Path(path).absolute()
        # One process writes, but two of its threads do: the writer's adds members while the loop's describes the run.
        self._turn = threading.Lock()
        self._lock: BaseFileLock | None = None
        with ExitStack() as on_failure:
            if mode == "w":
                self._lock = _create_and_lock(self._path)
                on_failure.callback(self._lock.release)
                self._prepare()
            self._manifest = read_manifest(self._path)
            on_failure.pop_all()

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
            changes["program"] = plain(program)
        if stopped is not None:
            changes["stopped"] = stopped
        with self._writing():
            self._write(msgspec.structs.replace(self._manifest, **changes))

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
                have (bfloat16 is `ml_dtypes.bfloat16`). They must not change meanwhile.
            member: from `new_member`.

        Returns:
            The member with its file's SHA-256.

        Raises:
            StoreError: the store is closed or only reads, the index exists, a tensor cannot be stored, or the disk
                refuses; the members before are unchanged.
        """
        if member.file != file_name(member.index):
            raise StoreError(f"a new member's file is {file_name(member.index)}, got {member.file!r}; use new_member")
        arrays = row_major(tensors)
        path = self._path / member.file
        with self._writing():
            self._check_is_new(member)
            try:
                with atomic.atomic_write(path) as temporary:
                    save_file(arrays, temporary, metadata={_KEY: entry(member)})
                    # Taken before the rename, of what this process has written: whatever alters the file later differs.
                    sha256 = atomic.digest(temporary)
            except (OSError, SafetensorError) as error:
                raise _refused(path, sum(array.nbytes for array in arrays.values()), error) from error
        return msgspec.structs.replace(member, sha256=sha256)

    def add(self, member: Member, *, stopped: str | None = None) -> None:
        """Add a member to the manifest, once `put` has written its file.

        Arguments:
            member: what `put` returned.
            stopped: why the run stopped, if this is its last member.

        Raises:
            StoreError: the store is closed or only reads, the index exists, or the manifest cannot be written.
        """
        with self._writing():
            self._check_is_new(member)
            manifest = self._manifest.with_member(member)
            self._write(manifest if stopped is None else msgspec.structs.replace(manifest, stopped=stopped))

    def truncate(self, count: int) -> None:
        """Keep the first `count` members and delete the others; the run counts as unfinished again.

        Raises:
            StoreError: the store is closed or only reads, or the disk refuses.
        """
        with self._writing():
            kept, forgotten = self.members[:count], self.members[count:]
            # The manifest first: killed in between, files that nothing names are left, not names without files.
            self._write(msgspec.structs.replace(self._manifest, members=kept, stopped=None))
            try:
                for member in forgotten:
                    (self._path / member.file).unlink(missing_ok=True)
            except OSError as error:
                raise StoreError(f"{self._path}: a forgotten member cannot be deleted: {error}") from error

    def file(self, index: int, *, verify: bool = True) -> Path:
        """Return the path of a member's file after checking it.

        Arguments:
            index: the member's number.
            verify: whether to compare its SHA-256, which reads the whole file.

        Raises:
            StoreError: there is no such member, or its file cannot be read.
            CorruptSnapshotError: the file is missing, a link out of the directory, not a whole safetensors file,
                another member's, or (with `verify`) altered.
        """
        member = next((member for member in self.members if member.index == index), None)
        if member is None:
            indexes = [member.index for member in self.members]
            raise StoreError(f"{self._path} has no member {index!r}; there are {indexes}")
        path = self._path / member.file
        fault = ""
        with _reading(path):  # the cheapest check first
            if not path.is_file():
                fault = "is missing"
            elif path.resolve().parent != self._path.resolve():
                fault = "is a link out of the run's directory"
            elif not describes(read_metadata(path).get(_KEY, ""), member):
                fault = "does not say of itself what the manifest says: one was altered, or files were swapped"
            elif verify and atomic.digest(path) != member.sha256:
                fault = "does not have the SHA-256 that was recorded"
        if fault:
            raise CorruptSnapshotError(f"{path} {fault}; restore the file, or leave member {index} out")
        self._check_manifest()
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
        path = self.file(index, verify=verify)
        with _reading(path):
            tensors = map_tensors(path)
        return {name: tensor.copy() for name, tensor in tensors.items()} if verify else tensors

    def verify(self) -> None:
        """Check every member's file against the manifest.

        Raises:
            CorruptSnapshotError: naming the first file that is damaged.
        """
        for member in self.members:
            self.file(member.index)
        self._check_manifest()

    def close(self) -> None:
        """Free the lock. Members can still be read, but nothing can be written; closing twice is allowed."""
        with self._turn:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Let one thread write, if the lock is held."""
        with self._turn:
            if self._lock is None:
                raise StoreError(f"{self._path} is closed or open to read; open it with mode='w' to write")
            yield

    def _prepare(self) -> None:
        """Delete what killed writers left, and start the manifest if there is none."""
        try:
            atomic.sweep(self._path)
            started = (self._path / MANIFEST).exists()
            orphans = [path.name for path in self._path.glob("snapshot-*.safetensors")]
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error}") from error
        if started:
            return
        if orphans:  # a new manifest would number its members from 1, and overwrite these
            raise CorruptSnapshotError(f"{self._path / MANIFEST} is missing beside {min(orphans)}; restore it")
        self._write(Manifest())

    def _write(self, manifest: Manifest) -> None:
        path = self._path / MANIFEST
        data = format_manifest(manifest)
        try:
            with atomic.atomic_write(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise _refused(path, len(data), error) from error
        self._manifest = sealed(manifest)

    def _check_manifest(self) -> None:
        if not is_sealed(self._manifest):
            raise CorruptSnapshotError(
                f"{self._path / MANIFEST} does not have the SHA-256 that was recorded in it: it was altered; restore it"
            )

    def _check_is_new(self, member: Member) -> None:
        if any(member.index == other.index for other in self.members):
            raise StoreError(f"{self._path} has member {member.index}; nothing is overwritten: use another index")


def move_aside(path: str | Path) -> Path:
    """Rename a run directory to the first free of `<name>.1`, `<name>.2`, … and return the new path.

    Raises:
        StoreError: it holds no run, a writer holds its lock, or it cannot be renamed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     SnapshotStore(f"{directory}/run", "w").close()
        ...     move_aside(f"{directory}/run").name
        'run.1'
    """
    source = Path(path).absolute()
    if not (source / MANIFEST).exists():
        raise StoreError(f"{source} holds no run: there is no {MANIFEST}; move it yourself if you mean it")
    lock = _create_and_lock(source)
    try:
        if not atomic.POSIX:  # Windows renames no directory in which a file is open
            lock.release()
        number = 1
        while (target := source.with_name(f"{source.name}.{number}")).exists():
            number += 1
        return source.rename(target)
    except OSError as error:
        raise StoreError(f"{source} cannot be renamed to {target.name}: {error}") from error
    finally:
        lock.release()


def _create_and_lock(directory: Path) -> BaseFileLock:
    # The system's own lock, not the existence of a file: it is free as soon as its process is dead, however it died.
    # Opened in one thread, it may be freed in another: the writer's thread outlives the loop.
    lock = FileLock(directory / ".lock", timeout=0, thread_local=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise StoreError(f"{directory} is being written by another run; wait for it, or choose another") from error
    except OSError as error:
        raise StoreError(f"{directory} cannot be written: {error}; choose another directory") from error
    return lock


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a member's file may raise into an error that names the file."""
    try:
        yield
    except SafetensorError as error:
        raise CorruptSnapshotError(f"{path} is not a whole safetensors file: {error}; restore it") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; check the disk and the file's mode") from error


def _refused(path: Path, size: int, error: Exception) -> StoreError:
    return StoreError(
        f"{path} could not be written, which needs {size} bytes: {error}; make room or choose another disk, "
        "the members before are unchanged"
    )
