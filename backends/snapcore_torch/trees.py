"""What a model is called with: tensors, alone or within tuples, lists and dicts."""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snapcore import DataError
from snapcore_torch.state import to_torch

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def mapped(x: Any, change: Callable[[Tensor], Any], *, arrays: bool = False) -> Any:
    """Return the same with each tensor changed, also those in containers; with `arrays`, of NumPy arrays too."""
    if arrays and isinstance(x, np.ndarray):
        return change(to_torch(x))
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, dict):
        return {name: mapped(each, change, arrays=arrays) for name, each in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(mapped(each, change, arrays=arrays) for each in x)
    return x


def described(x: Any) -> Hashable:
    """Return all but the tensors' values: what two calls have in common if the same kernels do both.

    Raises:
        DataError: there is something else than tensors and plain values, which might hold tensors.
    """
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    if isinstance(x, dict):
        return dict, tuple((name, described(each)) for name, each in x.items())
    if isinstance(x, tuple | list):
        return type(x), tuple(map(described, x))
    if isinstance(x, _PLAIN):
        return type(x), x  # True is not 1
    raise DataError(
        f"strategy 'graph' takes tensors and plain values, also in tuples, lists and dicts, got {type(x).__name__}: "
        "pass the tensors that it holds, or use strategy='loop'"
    )
