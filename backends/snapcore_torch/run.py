"""A run for a training loop of your own: it counts, sets the rate, takes the snapshots, and resumes after a kill."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from snapcore import Program, ProtocolError, Schedule, Snapshot
from snapcore.protocol import OptimizerState
from snapcore.run import EpochBatches, Position, Recorder
from snapcore.store import Tensors
from snapcore_torch.counting import ParameterWatch, UpdateCount
from snapcore_torch.distributed import copy_from_first, current_group, refuse_sharded
from snapcore_torch.ema import AverageCount
from snapcore_torch.loaders import SeedHolder, generators, with_new_workers
from snapcore_torch.optimizers import check_optimizer, inside, settings_of
from snapcore_torch.schedule import GroupRates
from snapcore_torch.state import (
    Copy,
    load_training,
    load_weights,
    named_tensors,
    pack_training,
    random_state,
    set_generators,
    set_random_state,
    states_of_all,
)

Batch = TypeVar("Batch")
FreshWeights = Callable[[int], "nn.Module | Mapping[str, Tensor]"]


class SnapshotRun:
    """Take snapshots from a training loop of your own, and resume after a kill.

    It counts the optimizer's own steps, so `step()` may as well be called once per micro-batch; parameters that change
    without one are refused. `step()` sets the rate of the next update; at the end of a cycle it first copies the
    weights, and the file is written behind the loop. No scheduler is needed beside it. Opening the directory of an
    unfinished run again restores weights, optimizer, rate and random states; with `batches`, the order of the data too.

    Where `torch.distributed` is initialized, as under `torchrun`, its processes train one model together: each makes a
    run for the same directory and calls `step()` at the same updates. Process 0 writes, and the others copy nothing. A
    member's batch statistics are process 0's, as are those of a resume point; random states are each process's own.

    Arguments:
        directory: the run's own; created.
        cycles_or_program: a schedule, or a program from `snapcore.program`.
        model: whose state is copied: parameters and persistent buffers.
        optimizer: the one optimizer that trains it, or parts of it. Groups keep their ratio to the reference rate, as
            do those that are added later.
        resume: resume an unfinished run that is there; False moves any run aside.
        resume_every: updates between two resume points, beside those at every cycle's end.
        init: for programs with `fresh` restarts: gives a module or a state dict for a member number.
        reference_lr: the rate that the schedule stands for; by default found in the optimizer.
        scaler: a `GradScaler`; updates that it skips are not counted, and its state is part of resume points.
        state: more objects with `state_dict` and `load_state_dict` for resume points, by name; modules that the
            optimizer trains beside the model must be among them. A loader is taken to keep its own position. Of several
            processes each gets its own back.
        weights: another module whose weights become the members, such as an `AveragedModel` (EMA); its count is part of
            resume points, and a restart gives it the new weights too.
        at: where a trainer that keeps checkpoints of its own starts or resumes, from `position()`; it has restored
            weights and optimizer by then. Resume points and SIGTERM are left to it.
        on_member: called with each `Snapshot` as it is taken.
        metrics: called with each `Snapshot`; the numbers that it returns by name are recorded with the member.

    Raises:
        StoreError: the directory holds a finished run, another program's or another optimizer's, is being written, or
            cannot be written.
        ProtocolError: the program restarts from fresh weights and `init` is missing; several optimizers; one that
            trains something else than the model, or shards its state.
        DataError: a state holds something that could only be pickled, or does not fit what was saved; the weights are
            sharded over several processes.

    Example:
        >>> import tempfile, torch
        >>> from snapcore import CosineCycles
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SnapshotRun(folder, CosineCycles(lr=0.1, steps=64, cycles=4), model, optimizer) as run:
        ...         for x in run.batches([torch.randn(8, 4)]):
        ...             optimizer.zero_grad(); model(x).square().mean().backward(); optimizer.step()
        ...             taken = run.step()
        ...     run.updates, run.finished
        (64, True)
    """

    def __init__(  # noqa: PLR0913  all but four are keywords, and each stands alone
        self,
        directory: str | Path,
        cycles_or_program: Schedule | Program,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        resume: bool = True,
        resume_every: int | None = None,
        init: FreshWeights | None = None,
        reference_lr: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        state: Mapping[str, Any] | None = None,
        weights: nn.Module | None = None,
        at: Position | None = None,
        on_member: Callable[[Snapshot], object] | None = None,
        metrics: Callable[[Snapshot], Mapping[str, float] | None] | None = None,
    ) -> None:
        self._source = _Source(model, optimizer, weights=weights, scaler=scaler, state=state, init=init)
        self._optimizer, self._scaler = optimizer, scaler
        self._rates = GroupRates(optimizer, reference_lr)
        self._used_lr: float | None = None  # of the last update, if it was not the schedule's
        self._recorder = Recorder(
            directory,
            cycles_or_program,
            self._source,
            framework="torch",
            resume=resume,
            resume_every=resume_every,
            group=self._source.group,
            at=at,
            on_member=on_member,
            metrics=metrics,
        )
        self._cursor = self._recorder.cursor
        try:
            self._recorder.start()
        except BaseException:
            self._recorder.close(exact=False)
            raise
        self._rates.apply(self._cursor.lr)
        self._count = UpdateCount(optimizer, before=self._before_update)
        self._watch = ParameterWatch(model, optimizer)

    @property
    def updates(self) -> int:
        """Updates recorded so far."""
        return self._cursor.step

    @property
    def finished(self) -> bool:
        """Whether the program has stopped."""
        return self._cursor.finished

    @property
    def lr(self) -> float:
        """The schedule's rate for the next update."""
        return self._cursor.lr

    def step(self, updates: int | None = None) -> Snapshot | None:
        """Record the updates done since the last call, take what is due, set the next rate.

        Arguments:
            updates: how many; by default those that the optimizer itself counted. Say it where no Python runs at an
                update, as in a replayed CUDA graph, or where something else than the optimizer does it.

        Returns:
            The snapshot that was taken, or None.

        Raises:
            ProtocolError: an update came after the program had stopped, or was done by something else.
            StoreError, DivergedError: an earlier member could not be written or was refused.
            SystemExit: with code 143, after a SIGTERM and its resume point.
        """
        count = self._count
        skipped, counted = count.skipped, count.take()
        n = counted if updates is None else updates
        if not n and updates is None and not skipped and count.counts:
            self._watch.check(excuse=self._scaler_has_skipped)
        used, self._used_lr = self._used_lr, None
        # Asked for only then: to look for an attribute that is not there takes as long as to set the rate.
        setter = ""
        if used is not None and hasattr(self._optimizer.step, "_wrapped_by_lr_sched"):
            setter = "a scheduler beside the run"
        events = self._recorder.record(n, late="take", used_lr=used, setter=setter)
        if n:
            self._rates.apply(self._cursor.schedule(self._cursor.step))
        if n or skipped:  # after a restart, which writes to the parameters too
            self._watch.settle()
        if not events:
            return None
        return next((event for event in events if isinstance(event, Snapshot)), None)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's batches, epoch after epoch, until the program stops; after a resume, from where it was.

        The order is exact if it is drawn when an epoch starts, from the random states (`shuffle=True`) or from a
        `generator` of the loader, its data set or its samplers; if it depends on `set_epoch`; or if it is kept in the
        loader's own state, given in `state=`. So is what the data set draws for each batch, in this process or in
        workers. New workers are started every epoch, those of `persistent_workers=True` too: nobody can save the
        random streams of older ones.
        """
        return self._recorder.batches(self._walked(loader), stateful=self._source.is_stateful(loader))

    def epochs(self, loader: Iterable[Batch]) -> Iterator[tuple[int, EpochBatches[Batch]]]:
        """Yield (epoch, its batches), from epoch 0, until the program stops; otherwise as `batches`.

        After a resume the first is the epoch that was under way, with the batches that are left of it. If it was
        stopped after its last update none is left, and what the loop does at the end of an epoch is done then.
        """
        return self._recorder.epochs_of(self._walked(loader), stateful=self._source.is_stateful(loader))

    def extend(self) -> None:
        """Take in parameter groups that were added to the optimizer, at their ratio to the reference rate.

        The next update does it by itself; this sets their rate already now.
        """
        self._rates.apply(self._cursor.lr)

    def position(self) -> Position:
        """Return where the run is, for a trainer's own checkpoint, once the members before it are on disk."""
        position = self._recorder.position()
        return replace(position, step=position.step + self._count.waiting)

    def finish(self, reason: str) -> None:
        """End early, with an unfinished member if an update was done since the last one."""
        self._recorder.finish(reason)

    def close(self) -> None:
        """Wait for the writer and raise its error, if it has one; a run left early may be opened again."""
        self._count.remove()
        self._recorder.close()

    def _walked(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        self._source.use(loader)
        self._watch.settle()  # whatever was done to the weights between opening the run and training
        return with_new_workers(loader)

    def _before_update(self) -> None:
        if torch.compiler.is_compiling():  # what is read here would be compiled in
            return
        if self._rates.extend():
            self._rates.apply(self._cursor.lr)
        self._used_lr = self._rates.taken_over()

    def _scaler_has_skipped(self) -> bool:
        if getattr(self._optimizer, "step_was_skipped", False):  # Accelerate's
            return True
        scaler = self._scaler
        return scaler is not None and scaler.is_enabled() and scaler.state_dict()["_growth_tracker"] == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count.remove()
        self._recorder.__exit__(kind, error, trace)


class _Source:
    """What is being trained, as the recorder sees it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weights: nn.Module | None,
        scaler: torch.amp.GradScaler | None,
        state: Mapping[str, Any] | None,
        init: FreshWeights | None,
    ) -> None:
        self._state = dict(state or {})
        for name, each in self._state.items():
            if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
                raise ProtocolError(
                    f"state= takes objects with state_dict and load_state_dict, got {type(each).__name__} as {name!r}"
                )
        check_optimizer(optimizer, model, self._state)
        refuse_sharded(model)
        self._model, self._optimizer, self._init = model, optimizer, init
        self._members = model if weights is None else weights
        named_tensors(self._members)  # refuses what is no tensor
        self._average = AverageCount(weights) if isinstance(weights, AveragedModel) else None
        own = {"scaler": scaler, "average": self._average}
        self._own = {name: each for name, each in own.items() if each is not None}
        self.group = current_group()
        self._writes = self.group.rank == 0
        self._generators: list[torch.Generator | SeedHolder] | None = None
        self._resumed: dict[str, Any] | None = None

    @property
    def fresh(self) -> Callable[[int], Copy] | None:
        init = self._init
        if init is None:
            return None

        def fresh(member: int) -> Copy:
            weights = init(member)
            return Copy(named_tensors(weights) if isinstance(weights, nn.Module) else weights)

        return fresh

    def is_stateful(self, loader: object) -> bool:
        """Return whether the loader's own position is in resume points."""
        return any(loader is each for each in self._state.values())

    def use(self, loader: object) -> None:
        """Take in the generators of the loader about to be walked; after a resume, as they were."""
        self._generators = generators(loader)
        if self._resumed is not None:
            set_generators(self._generators, self._resumed)
            self._resumed = None

    def capture(self) -> Copy:
        return Copy(named_tensors(self._members) if self._writes else {})

    def restore(self, tensors: Tensors | None, *, optimizer: OptimizerState) -> None:
        if tensors is not None:
            for module in dict.fromkeys((self._model, self._members)):
                load_weights(module, tensors, "a restart's member")
                copy_from_first(named_tensors(module), self.group)
            if self._average is not None:
                self._average.start_over()
        if optimizer == "reset":
            for each in (self._optimizer, *inside(self._optimizer)):
                each.state.clear()

    def dump(self) -> tuple[Copy, dict[str, Any]]:
        states = states_of_all(self._state, self.group)
        # In every process: what one refuses all must refuse, or the others would wait for it.
        tensors, values = pack_training(self._members, self._model, self._optimizer, self._own, states)
        return Copy(tensors if self._writes else {}), values

    def load(self, tensors: Tensors, values: dict[str, Any]) -> None:
        rank = self.group.rank
        load_training(self._members, self._model, self._optimizer, self._own, self._state, tensors, values, rank=rank)

    def settings(self) -> dict[str, Any]:
        return settings_of(self._optimizer)

    def random_state(self) -> dict[str, Any]:
        return random_state(self._generators or ())

    def set_random_state(self, state: dict[str, Any]) -> None:
        set_random_state(state)
        if self._generators is None:
            self._resumed = state  # the loader is not known yet
        else:
            set_generators(self._generators, state)
