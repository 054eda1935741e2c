"""A run for a training loop of your own: it counts, sets the rate, takes the snapshots, and resumes after a kill."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

import keras
import tensorflow as tf

from snapcore import Program, ProtocolError, Schedule, Snapshot
from snapcore.protocol import as_program
from snapcore.run import EpochBatches
from snapcore_keras.run import FreshWeights, KerasRun, check_kinds
from snapcore_keras.schedule import SnapshotSchedule, check_rate, innermost
from snapcore_tensorflow.distributed import current_group

Batch = TypeVar("Batch")

_walks: "WeakKeyDictionary[Any, int]" = WeakKeyDictionary()
"""How often this process has begun an epoch of a data set; each time its shuffles draw their next seed."""


class SnapshotRun:
    """Take snapshots from a training loop of your own, and resume after a kill.

    An update is what the optimizer counts, `optimizer.iterations`: with `gradient_accumulation_steps` the micro-batches
    before it do not count, nor does what a `LossScaleOptimizer` skips. That count is read only when the end of a cycle
    may be reached, so that no update waits for it. At the end of a cycle `step` copies the weights on their own
    device, and the file is written behind the loop. Opening the directory of an unfinished run again restores weights,
    optimizers, rate, and the states of random and stateful recurrent layers; with `batches` or `epochs`, the order of
    the data too.

    An optimizer built with the matching `SnapshotSchedule` is left alone, and one call of `step` may follow several
    updates of a `tf.function`. One with a plain rate gets that of the next update at every `step`, computed on the
    device from its own count; a function that is traced already sees it. If another rate was set for an update whose
    count is read, that is warned of once, and a member records the rate that was used.

    Under `tf.distribute`, make the model and the optimizer in the strategy's scope. Where it spans several workers,
    each makes a run for the same directory and calls `step` at the same updates; worker 0 writes.

    Arguments:
        directory: the run's own; created. For several workers, one that all of them see.
        cycles_or_program: a schedule, or a program from `snapcore.program`.
        model: a built Keras model, whose weights are copied: parameters and batch statistics.
        optimizer: the one Keras optimizer that trains it.
        resume: resume an unfinished run that is there; False moves any run aside.
        resume_every: updates between two resume points, beside those at every cycle's end.
        init: for programs with `fresh` restarts: gives a model, made in the strategy's scope, for a member number; or
            arrays by the names of a member, the same in every worker.
        on_member: called with each snapshot as it is taken.
        metrics: gives what to record with a member; called with its snapshot.

    Raises:
        StoreError: the directory holds a finished run or another program's, is being written, or cannot be written.
        ProtocolError: the program restarts from fresh weights and `init` is missing; something else than a Keras model
            and one Keras optimizer; the optimizer was built for another model; or its schedule is not where the run is.
        ScheduleError: the optimizer has another schedule.
        DataError: the model has no weights yet, or what was saved does not fit it.

    Example:
        >>> import tempfile, keras, tensorflow as tf
        >>> from snapcore import CosineCycles
        >>> from snapcore_keras import SnapshotSchedule
        >>> cycles = CosineCycles(lr=0.1, steps=64, cycles=4)
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> optimizer = keras.optimizers.SGD(SnapshotSchedule(cycles), momentum=0.9)
        >>> optimizer.build(model.trainable_variables)
        >>> @tf.function
        ... def update(x):
        ...     with tf.GradientTape() as tape:
        ...         loss = tf.reduce_mean(tf.square(model(x)))
        ...     optimizer.apply(tape.gradient(loss, model.trainable_variables))
        >>> with tempfile.TemporaryDirectory() as folder, SnapshotRun(folder, cycles, model, optimizer) as run:
        ...     for x in run.batches([tf.ones((8, 4))]):
        ...         update(x)
        ...         run.step()
        >>> run.updates, run.finished
        (64, True)
    """

    def __init__(
        self,
        directory: str | Path,
        cycles_or_program: Schedule | Program,
        model: Any,
        optimizer: Any,
        *,
        resume: bool = True,
        resume_every: int | None = None,
        init: FreshWeights | None = None,
        on_member: Callable[[Snapshot], object] | None = None,
        metrics: Callable[[Snapshot], Mapping[str, float] | None] | None = None,
    ) -> None:
        check_kinds(model, optimizer)
        cycles = as_program(cycles_or_program).schedule
        scheduled = check_rate(optimizer, cycles) is not None
        self._optimizer, self._stepping = optimizer, False
        self._strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
        with self._strategy.scope():
            self._run = KerasRun(
                directory,
                cycles_or_program,
                model,
                optimizer,
                framework="tensorflow",
                resume=resume,
                resume_every=resume_every,
                init=init,
                on_member=on_member,
                metrics=metrics,
                group=current_group(self._strategy),
                check=None if scheduled else _refuse_several,
                used_rate=self._used_rate,
                scope=self._strategy.scope,
            )
        self._recorder, self._cursor = self._run.recorder, self._run.cursor
        self._resumed = self._cursor.step > 0
        self._set_rate = None if scheduled else _rate_setter(optimizer, cycles, self._run.begun_at or 0)
        if self._set_rate is not None:
            self._set_rate()

    @property
    def updates(self) -> int:
        """Updates done, as the optimizer counts them until the run has ended; asking waits for the last one."""
        return self._run.updates

    @property
    def finished(self) -> bool:
        """Whether the program has stopped."""
        return self._cursor.finished

    @property
    def lr(self) -> float:
        """The schedule's rate for the next update; asking waits for the last one."""
        return self._cursor.schedule(self.updates)

    def step(self) -> None:
        """Record the updates done since the last call, take what is due, set the next rate if it is a plain one.

        Raises:
            ProtocolError: an update came after the program had stopped; several came at once, at a plain rate; the
                weights have moved by another optimizer; or it is called within a `tf.function`.
            StoreError, DivergedError: an earlier member could not be written or was refused.
            SystemExit: with code 143, after a SIGTERM and its resume point.
            KeyboardInterrupt: after a Ctrl-C and its resume point.
        """
        if not tf.executing_eagerly():
            raise ProtocolError("run.step() is called between updates, by Python: call it outside the tf.function")
        self._recorder.epochs.settle()  # an accumulated or skipped micro-batch is used, too
        if self._run.call():
            self._stepping = True
            try:
                self._run.look()
            finally:
                self._stepping = False
        else:
            self._recorder.record(0)  # raises what the writer has met
        if self._set_rate is not None:
            self._set_rate()

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's batches, epoch after epoch, until the program stops; after a resume, from where it was.

        The order is exact if it depends on the random states of NumPy or Python, on a sampler's `set_epoch`, or on
        nothing; and that of a `tf.data.Dataset`, distributed or not, if it shuffles with a seed.

        Raises:
            ProtocolError: a `tf.data.Dataset` is shuffled without a seed, or was walked before the run was resumed.
        """
        return self._run.batches(self._walked(loader))

    def epochs(self, loader: Iterable[Batch]) -> Iterator[tuple[int, EpochBatches[Batch]]]:
        """Yield each epoch's number, from 0, and its batches, until the program stops.

        After a resume the first is the epoch that was under way, with the batches that are left of it. The order is
        exact where that of `batches` is.
        """
        return self._run.epochs_of(self._walked(loader))

    def finish(self, reason: str) -> None:
        """End early, with an unfinished member if an update was done since the last one."""
        self._run.finish(reason)

    def close(self) -> None:
        """Wait for the writer and raise its error, if it has one; a run left early may be opened again."""
        self._run.close(exact=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.close(exact=kind is None)

    def _used_rate(self, step: int) -> tuple[float, str] | None:
        """Return the rate of the update after `step` others: a plain one, if that update was the last call's."""
        every_call_an_update = step + 1 - self._cursor.step == self._run.waiting
        if self._set_rate is None or not self._stepping or not every_call_an_update:
            return None
        rate = innermost(self._optimizer).learning_rate
        return (
            (float(keras.ops.convert_to_numpy(keras.ops.copy(rate))), "")
            if rate.dtype in (tf.float32, tf.float64)
            else None
        )  # half types round it

    def _walked(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Return the loader, its data sets ready to draw the seed of the epoch that comes next.

        Raises:
            ProtocolError: a seed cannot be drawn again.
        """
        inside = [loader] if _is_dataset(loader) else getattr(loader, "__dict__", {}).values()
        shuffled = [each for each in inside if _is_dataset(each) and _shuffles(each)]
        epoch, walks = self._recorder.epochs.state_dict()["epoch"], [_walks.get(each, 0) for each in shuffled]
        if not self._resumed:
            self._run.values["walks"] = [done - epoch for done in walks]
        saved = self._run.values.setdefault("walks", [0] * len(shuffled))
        if len(saved) != len(shuffled):
            raise ProtocolError(
                f"the loader shuffles {len(shuffled)} tf.data.Datasets, and {len(saved)} when the run was saved: build "
                "it as it was"
            )
        for dataset, before, done in zip(shuffled, saved, walks, strict=True):
            if done > before + epoch:
                raise ProtocolError(
                    "the tf.data.Dataset was walked before in this process, and its shuffles cannot go back: make it "
                    "anew to resume"
                )
            for _ in range(before + epoch - done):
                batches = iter(dataset)  # which draws a seed; `repeat` draws more of them later
                if any(type(each).__name__ == "_RepeatDataset" for each in _parts(dataset)):
                    collections.deque(batches, maxlen=0)
                _walks[dataset] = _walks.get(dataset, 0) + 1
        self._resumed = False
        return _Walked(loader, shuffled)


class _Walked(Iterable[Batch]):
    """A loader whose every epoch counts as one of its data sets."""

    def __init__(self, loader: Iterable[Batch], datasets: list[Any]) -> None:
        self.loader, self._datasets = loader, datasets  # `loader`: where its `set_epoch` is looked for

    def __iter__(self) -> Iterator[Batch]:
        for dataset in self._datasets:
            _walks[dataset] = _walks.get(dataset, 0) + 1
        return iter(self.loader)


def _is_dataset(value: Any) -> bool:
    return isinstance(value, tf.data.Dataset | tf.distribute.DistributedDataset)


def _shuffles(dataset: Any) -> bool:
    """Return whether a data set draws a seed for every epoch; refuse one that no other process can draw.

    Raises:
        ProtocolError: saying what to do.
    """
    shuffles = [each for each in _parts(dataset) if getattr(each, "_seed2", None) is not None]
    if not all(tf.get_static_value(each._seed) or tf.get_static_value(each._seed2) for each in shuffles):
        raise ProtocolError(
            "the tf.data.Dataset is shuffled without a seed, so a resumed run could not draw its order again: call "
            "shuffle(…, seed=0)"
        )
    return bool(shuffles)


def _parts(dataset: Any) -> list[Any]:
    """Return a data set, which may be distributed, and all that it is made from."""
    dataset = getattr(dataset, "_original_dataset", dataset)
    return [dataset, *(part for each in dataset._inputs() for part in _parts(each))]


def _refuse_several(updates: int, calls: int) -> None:
    if updates > calls:
        raise ProtocolError(
            f"{updates} updates were done in {calls} calls of run.step(), all at one rate: call it after every update, "
            "or build the optimizer with SnapshotSchedule(cycles)"
        )


def _rate_setter(optimizer: Any, cycles: Schedule, before: int) -> Callable[[], None]:
    """Return what sets a plain rate to that of the next update."""
    inner, rate = innermost(optimizer), SnapshotSchedule(cycles, begin=before)

    def set_rate() -> None:
        inner.learning_rate.assign(rate(inner.iterations))

    # From the optimizer's own count, on the device: right after a skipped update too, and nothing waits for it.
    function: Callable[[], None] = tf.function(set_rate)
    return function
