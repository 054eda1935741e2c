"""A run directory: one safetensors file per member and one manifest, `snapcore.json`.

A member's file is in place before the manifest names it, so whoever reads the manifest finds whole
files or an error naming the damaged one. One process writes, any number read, and nothing that the
manifest names is ever overwritten.
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
        mode: `"r"` reads, creates nothing and needs no lock; `"w"` creates the directory or goes on
            in it, and holds its lock until `close` (the system frees it if the process dies).

    Raises:
        StoreError: `"r"` and there is no run; `"w"` and another writer holds the lock, or the
            directory cannot be written; or another version of snapcore wrote it.
        CorruptSnapshotError: the manifest is damaged, or missing where there are snapshots.

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
        self._turn = threading.Lock()  # a writer thread saves while the loop describes
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
        """Return the run's directory, absolute."""
        return self._path

    @property
    def members(self) -> tuple[Member, ...]:
        """Return the members by index, as the manifest had them when opened, and those saved since."""
        return self._manifest.members

    @property
    def program(self) -> dict[str, Any] | None:
        """Return a copy of the described program, or None."""
        return copy.deepcopy(self._manifest.program)

    @property
    def stopped(self) -> str | None:
        """Return why the run stopped, or None while it has not."""
        return self._manifest.stopped

    def describe(self, *, program: dict[str, Any] | None = None, stopped: str | None = None) -> None:
        """Write the program or the reason to stop into the manifest; what is None stays as it was.

        Arguments:
            program: plain JSON, such as a program's `to_dict()`.
            stopped: why the run ended.

        Raises:
            StoreError: the store is closed or only reads, `program` is not plain JSON, or the
                manifest cannot be written (it is then as it was).
        """
        changes: dict[str, Any] = {}
        if program is not None:
            changes["program"] = plain(program)
        if stopped is not None:
            changes["stopped"] = stopped
        with self._turn:
            self._check_may_write()
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

        The same as `put`, then `add`.

        Arguments:
            tensors: the weights by name; arrays of any shape and layout, of a type that safetensors
                and NumPy both know (bfloat16 through `ml_dtypes`). They must not change meanwhile.
            index: the member's number, from 1; one that is not there yet.
            step: optimizer updates done.
            cycle: the cycle it closes, from 0.
            lr: the rate of the last update done.
            framework: who writes, such as `torch`.
            due: the step at which it was due; None means `step`.
            unfinished: whether its cycle was cut short.
            metrics: finite numbers to keep with it, by name.

        Returns:
            The member as the manifest now has it.

        Raises:
            StoreError: the store is closed or only reads, the index is taken, a value or a tensor
                cannot be recorded, or the disk refuses; the members before are as they were.
        """
        member = self.put(
            tensors,
            index=index,
            step=step,
            cycle=cycle,
            lr=lr,
            framework=framework,
            due=due,
            unfinished=unfinished,
            metrics=metrics,
        )
        self.add(member)
        return member

    def put(
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
        """Write a member's file alone: no reader knows of it before `add`. Arguments and errors are those of `save`."""
        arrays = row_major(tensors)
        member = new_member(
            index=index,
            step=step,
            due=step if due is None else due,
            cycle=cycle,
            lr=lr,
            framework=framework,
            unfinished=unfinished,
            metrics=metrics,
        )
        with self._turn:
            self._check_may_write()
            self._check_is_new(member)
            return self._write_member(arrays, member)

    def add(self, member: Member, *, stopped: str | None = None) -> None:
        """Name in the manifest a member whose file `put` has written.

        Arguments:
            member: what `put` returned.
            stopped: why the run ended, if this was its last.

        Raises:
            StoreError: the store is closed or only reads, the index is taken, or the manifest cannot be written.
        """
        with self._turn:
            self._check_may_write()
            self._check_is_new(member)
            manifest = self._manifest.with_member(member)
            self._write(manifest if stopped is None else msgspec.structs.replace(manifest, stopped=stopped))

    def keep(self, count: int) -> None:
        """Forget the members after the first `count`, and why the run ended; then delete their atomic.

        Raises:
            StoreError: the store is closed or only reads, or the disk refuses.
        """
        with self._turn:
            self._check_may_write()
            kept, forgotten = self.members[:count], self.members[count:]
            self._write(msgspec.structs.replace(self._manifest, members=kept, stopped=None))
            try:
                for member in forgotten:
                    (self._path / member.file).unlink(missing_ok=True)
            except OSError as error:
                raise StoreError(f"{self._path}: a forgotten member cannot be deleted: {error}") from error

    def file(self, index: int, *, verify: bool = True) -> Path:
        """Return the path of a member's file, once checked.

        Arguments:
            index: the member's number.
            verify: whether to compare the SHA-256 too, which reads the whole file.

        Raises:
            StoreError: there is no such member, or its file cannot be read.
            CorruptSnapshotError: the file is missing, a link out of the directory, not a whole
                safetensors file, another member's, or (with `verify`) altered.
        """
        member = self._find(index)
        path = self._path / member.file
        with _reading(path):
            fault = self._fault(path, member, verify)
        if fault:
            raise CorruptSnapshotError(f"{path} {fault}; restore the file, or leave member {index} out")
        self._check_manifest()
        return path

    def load(self, index: int, *, verify: bool = True) -> dict[str, Array]:
        """Read a member's tensors.

        Arguments:
            index: the member's number.
            verify: True compares the SHA-256 and gives writable arrays in memory; False only maps
                the file, read-only, and reads what is touched when it is touched.

        Returns:
            Arrays by name, with the shapes and types that were saved; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            StoreError: there is no such member, or its file cannot be read.
            CorruptSnapshotError: see `file`.
        """
        path = self.file(index, verify=verify)
        with _reading(path):
            tensors = map_tensors(path)
        return {name: tensor.copy() for name, tensor in tensors.items()} if verify else tensors

    def verify(self) -> None:
        """Check every member's file against the manifest.

        Raises:
            CorruptSnapshotError: naming the first file that is not what was written.
        """
        for member in self.members:
            self.file(member.index)
        self._check_manifest()

    def close(self) -> None:
        """Free the lock; reading goes on, writing does not. Closing twice is closing once."""
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

    def _prepare(self) -> None:
        """Sweep up after killed writers, and begin the manifest where there is none."""
        try:
            atomic.sweep(self._path)
            begun = (self._path / MANIFEST).exists()
            orphans = [path.name for path in self._path.glob("snapshot-*.safetensors")]
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error}") from error
        if begun:
            return
        if orphans:  # a new manifest would have their indexes taken again, and them overwritten
            raise CorruptSnapshotError(f"{self._path / MANIFEST} is missing beside {min(orphans)}; restore it")
        self._write(Manifest())

    def _write(self, manifest: Manifest) -> None:
        path = self._path / MANIFEST
        data = format_manifest(manifest)
        try:
            with atomic.replacing(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise _refused(path, len(data), error) from error
        self._manifest = sealed(manifest)

    def _write_member(self, arrays: dict[str, Array], member: Member) -> Member:
        path = self._path / member.file
        try:
            with atomic.replacing(path) as temporary:
                save_file(arrays, temporary, metadata={_KEY: entry(member)})
                sha256 = atomic.digest(temporary)
        except (OSError, SafetensorError) as error:
            raise _refused(path, sum(array.nbytes for array in arrays.values()), error) from error
        return msgspec.structs.replace(member, sha256=sha256)

    def _check_manifest(self) -> None:
        if not is_sealed(self._manifest):
            raise CorruptSnapshotError(
                f"{self._path / MANIFEST} does not have the SHA-256 that was recorded in it: it was altered; restore it"
            )

    def _check_may_write(self) -> None:
        if self._lock is None:
            raise StoreError(f"{self._path} is closed or open to read; open it with mode='w' to write")

    def _check_is_new(self, member: Member) -> None:
        if member.index in self._indexes():
            raise StoreError(f"{self._path} has member {member.index}; nothing is overwritten: use another index")

    def _find(self, index: int) -> Member:
        for member in self.members:
            if member.index == index:
                return member
        raise StoreError(f"{self._path} has no member {index!r}; there are {self._indexes()}")

    def _indexes(self) -> list[int]:
        return [member.index for member in self.members]

    def _fault(self, path: Path, member: Member, verify: bool) -> str:
        """Tell what is wrong with a member's file, cheapest first; empty if nothing is."""
        if not path.is_file():
            return "is missing"
        if path.resolve().parent != self._path.resolve():
            return "is a link out of the run's directory"
        if not describes(read_metadata(path).get(_KEY, ""), member):
            return "does not say of itself what the manifest says: one was altered, or files were swapped"
        if verify and atomic.digest(path) != member.sha256:
            return "does not have the SHA-256 that was recorded"
        return ""


def move_aside(path: str | Path) -> Path:
    """Rename a run's directory to the first free of `<name>.1`, `<name>.2`, … and return that.

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
        return _rename(source)
    finally:
        lock.release()


def _rename(source: Path) -> Path:
    number = 1
    while (target := source.with_name(f"{source.name}.{number}")).exists():
        number += 1
    try:
        return source.rename(target)
    except OSError as error:
        raise StoreError(f"{source} cannot be renamed to {target.name}: {error}") from error


def _create_and_lock(directory: Path) -> BaseFileLock:
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
        "the members before are as they were"
    )
