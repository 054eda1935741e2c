"""Several processes under `MultiWorkerMirroredStrategy`: the group they form, and what they exchange."""

import json
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from snapcore import ProtocolError
from snapcore.run import Group

_KINDS = ("chief", "worker")
"""The tasks that train, in the order of their ranks."""


class TensorFlowGroup:
    """The workers of a `tf.distribute.MultiWorkerMirroredStrategy`, as a run sees them.

    The chief is number 0: the task that is called so, or else worker 0. Each verb is called by all, at the same
    update.

    Arguments:
        strategy: the workers' own, made with `TF_CONFIG` in every one of them.

    Raises:
        ProtocolError: the strategy knows no workers.
    """

    def __init__(self, strategy: Any) -> None:
        tasks = _tasks(strategy)
        if not tasks:
            raise ProtocolError(
                f"several processes need a tf.distribute.MultiWorkerMirroredStrategy, and TF_CONFIG set in each of "
                f"them before it is made; got a {type(strategy).__name__} without workers"
            )
        resolver = strategy.cluster_resolver
        self.rank = tasks.index((resolver.task_type, resolver.task_id))
        self.size = len(tasks)

        def collect(array: Any) -> Any:
            return strategy.gather(strategy.run(lambda: array[None]), axis=0)

        self._collect = tf.function(collect, [tf.TensorSpec([None], tf.int32)], autograph=False)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank.

        Arguments:
            value: plain JSON.
        """
        text = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.int32)  # collectives know no bytes
        lengths = self._gathered(np.array([text.size], np.int32))
        texts = self._gathered(np.pad(text, (0, int(lengths.max()) - text.size)))
        return [json.loads(bytes(text[: lengths[rank, 0]].tolist())) for rank, text in enumerate(texts)]

    def _gathered(self, array: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return every process's array, [size, …]; they are of one length."""
        found: NDArray[np.int32] = self._collect(array).numpy()
        local = len(found) // self.size
        return found[::local]  # every replica of a process gives the same


def current_group(strategy: Any) -> Group | None:
    """Return the group that this process belongs to under a strategy (None: no strategy), or None if it is alone."""
    return TensorFlowGroup(strategy) if len(_tasks(strategy)) > 1 else None


def _tasks(strategy: Any) -> list[tuple[str, int]]:
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return []  # others may know of machines too, but have one process that does the work
    cluster = strategy.cluster_resolver.cluster_spec().as_dict()
    return [(kind, number) for kind in _KINDS for number in range(len(cluster.get(kind, ())))]
