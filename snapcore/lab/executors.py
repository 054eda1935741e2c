"""Where the cells of a comparison are trained: in processes here, or by an executor of somebody else's."""

import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, Self

from snapcore.errors import DataError


class Future(Protocol):
    """What an executor gives back for a call: `concurrent.futures.Future`, and submitit's `Job`."""

    def done(self) -> bool:
        """Return whether there is a result or an exception."""
        ...

    def exception(self) -> BaseException | None:
        """Return what the call has raised, or what its worker has died of."""
        ...

    def result(self) -> Any:
        """Return the call's result."""
        ...


class Executor(Protocol):
    """Any `concurrent.futures.Executor`, Dask's (`client.get_executor()`) or submitit's."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future:
        """Have a function called somewhere, which it is imported for by its name."""
        ...


class Processes:
    """Processes of this machine, started anew when one dies: a pool alone gives up then.

    Arguments:
        jobs: how many at a time, 1 or more. Each computes with its share of the threads, unless OMP_NUM_THREADS says
            how many.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._pool = self._started()

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future:
        """Have a function called in one of the processes."""
        try:
            return self._pool.submit(call, *arguments)
        except BrokenExecutor:
            self._pool.shutdown(wait=False)
            self._pool = self._started()
            return self._pool.submit(call, *arguments)

    def _started(self) -> ProcessPoolExecutor:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Frameworks do not survive a fork, and threads that fight for cores take longer than they share them.
        return ProcessPoolExecutor(
            self.jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_share_threads,
            initargs=(max(1, usable // self.jobs),),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=error is None, cancel_futures=True)


def _share_threads(threads: int) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ.setdefault(name, str(threads))


def connect(address: str) -> AbstractContextManager[Executor]:
    """Return the executor at an address: `dask://host:port` is that of a Dask scheduler.

    Raises:
        DataError: another kind of address, or what it needs is not installed.
        OSError: nobody answers there.
    """
    kind, separator, where = address.partition("://")
    if kind != "dask" or not separator or not where:
        raise DataError(f"executor must be dask://host:port, got {address!r}; from Python, compare takes any executor")
    try:
        distributed = importlib.import_module("distributed")
    except ModuleNotFoundError as error:
        raise DataError(f"{address} needs {error.name}: pip install distributed") from error
    return distributed.Client(f"tcp://{where}", timeout="10s").get_executor(pure=False)  # type: ignore[no-any-return]
