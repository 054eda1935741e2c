"""The native loop: a chunk of updates in one call of one `tf.function`, over data that lies on the device.

Every call has the same shapes: a chunk that the end cuts short is filled up, and gets the number of updates to do. So
nothing is traced anew for cycles of another length, XLA has its constant shapes, and wherever a run was interrupted,
it resumes to the same bits. Rates come from the schedule itself, and are given to the optimizer update by update.
"""

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from snapcore import Schedule
from snapcore.backend import Data, Report, targets
from snapcore_tensorflow.losses import Loss

CHUNK = 200
"""Updates in one compiled call, at most, and between two reports: of small models, what is between calls shows."""


class Loop:
    """A model's updates and their batches, at a schedule's rates.

    Arguments:
        model: built under the strategy's scope.
        optimizer: built, likewise; its learning rate is a plain one.
        data: examples, targets, their order and the loss; put on every device of the strategy's.
        schedule: the rate of every update.
        strategy: the devices that share every batch equally; `tf.distribute.get_strategy()` for the one there is.
        xla: whether XLA compiles the calls.
    """

    def __init__(
        self, model: Any, optimizer: Any, data: Data, schedule: Schedule, *, strategy: Any, xla: bool = False
    ) -> None:
        self._model, self._optimizer, self._strategy = model, optimizer, strategy
        self._data, self._schedule = data, schedule
        self._replicas = strategy.num_replicas_in_sync
        self._loss = Loss(data.loss, data.ignore)
        x, y = np.asarray(data.x), targets(data)
        y = y.astype(np.int64, copy=False) if np.issubdtype(y.dtype, np.integer) else y
        self._examples = strategy.experimental_distribute_values_from_function(lambda _: tf.constant(x))
        self._targets = strategy.experimental_distribute_values_from_function(lambda _: tf.constant(y))
        self._xla = xla

    def run(self, start: int, stop: int, report: Report) -> None:
        """Do updates `start … stop − 1`; report every loss, a chunk at a time.

        Arguments:
            start: updates done before.
            stop: updates done after.
            report: called with the updates done and the loss, once the chunk after is under way.
        """
        waiting: tuple[int, int, Any] | None = None
        for begin in range(start, stop, CHUNK):
            end = min(begin + CHUNK, stop)
            losses = self._compiled(*self._numbers(begin, end))
            _report(waiting, report)
            waiting = begin, end, losses
        _report(waiting, report)

    def _numbers(self, start: int, stop: int) -> tuple[Any, Any, Any]:
        rates = np.array([self._schedule(step) for step in range(start, stop)], np.float32)
        rows = self._data.indices(start, stop).astype(np.int64)
        # What fills them up is not looked at.
        filled = np.resize(rows, (CHUNK, *rows.shape[1:])), np.resize(rates, CHUNK)
        return *map(tf.constant, filled), tf.constant(stop - start)

    @functools.cached_property
    def _compiled(self) -> Any:
        """The function that does some updates: of their batches and rates, and how many they are."""
        function = tf.function(self._updates, jit_compile=self._xla or None, autograph=False)
        return function.get_concrete_function(*map(tf.TensorSpec.from_tensor, self._numbers(0, 1)))

    def _updates(self, rows: Any, rates: Any, number: Any) -> Any:
        def update(index: Any, losses: Any) -> tuple[Any, Any]:
            self._optimizer.learning_rate = rates[index]
            shares = self._strategy.run(self._update, args=(self._examples, self._targets, rows[index]))
            return index + 1, losses.write(index, tf.add_n(self._strategy.experimental_local_results(shares)))

        losses = tf.TensorArray(tf.float32, CHUNK, element_shape=())
        begun = tf.constant(0), losses
        _, losses = tf.while_loop(lambda index, _: index < number, update, begun, parallel_iterations=1)
        losses = losses.stack()
        if self._replicas == 1:
            return losses
        # The sums over all workers, at once for a chunk.
        local = len(self._strategy.experimental_local_results(self._targets))
        return self._strategy.reduce("SUM", self._strategy.run(lambda: losses / local), axis=None)

    def _update(self, examples: Any, targets: Any, rows: Any) -> Any:
        """Do one replica's part of an update; return its share of the loss."""
        batch = part = tf.gather(targets, rows)
        if self._replicas > 1:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            rows = tf.reshape(rows, (self._replicas, -1))[replica]
            part = tf.gather(targets, rows)
        with tf.GradientTape() as tape:
            outputs = tf.cast(self._model(tf.gather(examples, rows), training=True), tf.float32)
            loss = self._loss.share(outputs, part, batch)
            if self._model.losses:
                loss += tf.cast(tf.add_n(self._model.losses), tf.float32) / self._replicas
            scaled = self._optimizer.scale_loss(loss)
        parameters = self._model.trainable_variables
        self._optimizer.apply(tape.gradient(scaled, parameters), parameters)  # which adds up all replicas' gradients
        return loss


def _report(chunk: tuple[int, int, Any] | None, report: Report) -> None:
    if chunk is not None:
        start, stop, losses = chunk
        for step, loss in enumerate(losses.numpy()[: stop - start].tolist(), start + 1):
            report(step, loss)
