"""Several processes that train one model together: what they send each other, and arrays spread over them."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from snapcore.run import Group


class JaxGroup:
    """All processes of `jax.distributed`, as a run sees them. Each verb is called by all, at the same update."""

    @property
    def rank(self) -> int:
        """The number of this process."""
        return int(jax.process_index())

    @property
    def size(self) -> int:
        """How many they are."""
        return int(jax.process_count())

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank.

        Arguments:
            value: plain JSON.
        """
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = _gathered(np.array(text.size, np.int32))
        texts = _gathered(np.pad(text, (0, int(lengths.max()) - text.size)))
        return [json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths, strict=True)]


def own_group() -> Group | None:
    """Return the group that this process belongs to, or None if it is alone."""
    return JaxGroup() if jax.process_count() > 1 else None


def whole(array: jax.Array) -> NDArray[Any]:
    """Return an array that is spread over several processes; all of them call this, and all get it."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _gathered(array: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(multihost_utils.process_allgather(array, tiled=False))
