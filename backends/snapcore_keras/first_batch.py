"""A check of the first outputs before anything is made of them: are they what the activation takes them for."""

import threading
from collections.abc import Sequence
from itertools import chain
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from snapcore.ensemble import refuse_equal_members
from snapcore_keras.activations import Check
from snapcore_keras.strategies import Forward, Weights

_UNKNOWN = 32
"""Length of an axis that may have any, other than the batch's: enough for most convolutions and poolings."""


class OutputCheck:
    """Run members and check their outputs: on the first batch, or where there are no values, on zeros.

    The first member's are to be what the activation takes them for, and another's are to differ from them. A batch is
    checked once. Zeros are too, and the first batch with values is still checked after them.

    Arguments:
        run_one: runs a member.
        members: the weights of each.
        check: refuses outputs; None if they may be anything.
        allow_equal: whether members whose weights differ may give equal outputs.
    """

    def __init__(self, run_one: Forward, members: Sequence[Weights], check: Check | None, *, allow_equal: bool) -> None:
        self._run_one, self._members, self._check = run_one, members, check
        self._undecided, self._zeros_passed = not allow_equal, False

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check what the model returns for these arguments.

        Raises:
            DataError: the outputs are not what the activation takes them for, or all members' are equal.
        """
        if self._check is None and not self._undecided:
            return
        if is_symbolic((args, kwargs)):
            self.check_zeros(args, kwargs)
            return
        found = self._found(self._members[0], args, kwargs)
        if found is None:
            elsewhere = _Elsewhere(self, args, kwargs)
            elsewhere.start()
            elsewhere.join()
            if elsewhere.error is not None:
                raise elsewhere.error
        elif found.size:
            self._undecided = not self._pass(found, args, kwargs)
            self._check = None

    def first_outputs(self, found: NDArray[Any]) -> None:
        """Check one member's outputs alone, where the others are not to be run.

        Raises:
            DataError: the outputs are not what the activation takes them for.
        """
        if self._check is not None and found.size:
            self._check(found)
            self._check = None

    def check_zeros(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check, once, what the model returns for zeros in the shapes of these arguments.

        Raises:
            DataError: the outputs are not what the activation takes them for, or all members' are equal.
        """
        if self._check is None or self._zeros_passed:
            return
        try:
            args, kwargs = keras.tree.map_structure(_zeros, (args, kwargs))
            found = self._found(self._members[0], args, kwargs)
        except Exception as error:
            error.add_note(
                "this came of a batch of zeros, which checks a model where there are no values: call the ensemble on a "
                "batch of your own first"
            )
            raise
        if found is not None and np.isfinite(found.astype(np.float64)).all():  # else all is masked
            self._pass(found, args, kwargs)
        self._zeros_passed = True

    def _pass(self, first: NDArray[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Check outputs, and return whether they decide that members are not all equal."""
        if self._check is not None:
            self._check(first)
        each = (self._found(weights, args, kwargs) for weights in self._members[1:])
        cure = "pass a freshly built model; or allow_equal=True"
        return not self._undecided or refuse_equal_members(chain([first], each), self._weights, cure)

    def _weights(self) -> list[list[NDArray[Any]]]:
        return [[np.asarray(ops.convert_to_numpy(each)) for each in weights] for weights in self._members]

    def _found(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NDArray[Any] | None:
        return on_host(self._run_one.outputs(weights, args, kwargs))


def is_symbolic(tree: Any) -> bool:
    """Return whether a tree of arguments holds a `keras.Input`, or what is computed of one."""
    return any(isinstance(leaf, keras.KerasTensor) for leaf in keras.tree.flatten(tree))


def on_host(tensor: Any) -> NDArray[Any] | None:
    """Return a tensor's values; None inside `jax.jit` or `tf.function`, where there are none."""
    try:
        return np.asarray(ops.convert_to_numpy(tensor))
    except (TypeError, NotImplementedError):
        return None


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
