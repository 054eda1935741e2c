"""A check of the first outputs before anything is made of them: are they what the activation takes them for."""

import threading
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from snapcore_keras.activations import Check
from snapcore_keras.strategies import Forward, Weights

_UNKNOWN = 32
"""Length of an axis that may have any, other than the batch's: enough for most convolutions and poolings."""


class OutputCheck:
    """Run the first member and check its outputs: on the first batch, or where there are no values, on zeros.

    A batch is checked once. Zeros are too, and the first batch with values is still checked after them.

    Arguments:
        run_one: runs a member.
        weights: the first member's.
        check: refuses outputs; None if there is nothing to check.
    """

    def __init__(self, run_one: Forward, weights: Weights, check: Check | None) -> None:
        self._run_one, self._weights, self._check = run_one, weights, check
        self._zeros_passed = False

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check what the model returns for these arguments.

        Raises:
            DataError: the outputs are not what the activation takes them for.
        """
        if self._check is None:
            return
        if is_symbolic((args, kwargs)):
            self.check_zeros(args, kwargs)
            return
        found = self._found(args, kwargs)
        if found is None:
            elsewhere = _Elsewhere(self, args, kwargs)
            elsewhere.start()
            elsewhere.join()
            if elsewhere.error is not None:
                raise elsewhere.error
        elif found.size:
            self._check(found)
            self._check = None

    def check_zeros(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check, once, what the model returns for zeros in the shapes of these arguments.

        Raises:
            DataError: the outputs are not what the activation takes them for.
        """
        if self._check is None or self._zeros_passed:
            return
        try:
            args, kwargs = keras.tree.map_structure(_zeros, (args, kwargs))
            found = self._found(args, kwargs)
        except Exception as error:
            error.add_note(
                "This came of a batch of zeros, by which a model is checked where there are no values. Call the "
                "ensemble on a batch of your own first: then that is checked instead."
            )
            raise
        if found is not None and np.isfinite(found.astype(np.float64)).all():  # else all is masked
            self._check(found)
        self._zeros_passed = True

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NDArray[Any] | None:
        outputs = self._run_one.outputs(self._weights, args, kwargs)
        try:
            return np.asarray(ops.convert_to_numpy(outputs))
        except (TypeError, NotImplementedError):  # inside jax.jit or tf.function there is no value
            return None


def is_symbolic(tree: Any) -> bool:
    """Return whether a tree of arguments holds a `keras.Input`, or what is computed of one."""
    return any(isinstance(leaf, keras.KerasTensor) for leaf in keras.tree.flatten(tree))


def _zeros(leaf: Any) -> Any:
    if not (isinstance(leaf, keras.KerasTensor) or ops.is_tensor(leaf)):
        return leaf
    shape = [(_UNKNOWN if axis else 1) if length is None else length for axis, length in enumerate(leaf.shape)]
    return ops.zeros(shape, keras.backend.standardize_dtype(leaf.dtype))


class _Elsewhere(threading.Thread):
    """Checks zeros in a thread of its own: graphs and traces belong to the thread that makes them, so here are values.

    Not from a pool, nor by a function within one: AutoGraph would rewrite both.

    Arguments:
        check: does it.
        args: what the model was called with in the other thread.
        kwargs: the same.
    """

    def __init__(self, check: OutputCheck, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self._outer, self._arguments = check, (args, kwargs)
        self.error: Exception | None = None

    def run(self) -> None:
        """Check, and keep the error for the thread that waits."""
        try:
            self._outer.check_zeros(*self._arguments)
        except Exception as error:  # noqa: BLE001 - it is raised there
            self.error = error
