"""How the managed loop does an update: precision, micro-batches, clipping, compilation, averaging."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from snapcore import DataError

Precision = Literal["float32", "bfloat16", "float16"]
_NARROW = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """How one optimizer update is done.

    Arguments:
        precision: what to compute in; weights, and members, stay float32. `"float16"` scales the loss: an update whose
            gradients overflowed is tried again with the same batch at a smaller scale, so that every update is real.
        accumulate: micro-batches that a batch is split into, 1 … batch size. The gradient is that of the whole batch,
            for a loss that is a mean over examples; batch statistics are those of the micro-batches.
        clip_norm: the gradient's largest 2-norm, above 0; None leaves it alone.
        channels_last: keep images and weights as [batch, height, width, channels] in memory; names, shapes and
            members are as ever.
        compile: True, a mode such as `"max-autotune"`, or keyword arguments for `torch.compile`.
        ema: decay d in 0 ≤ d < 1 of averaged weights a ← d·a + (1 − d)·w after every update, buffers too. The members
            are then the averages, and so is what is scored; None takes the weights themselves.

    Raises:
        DataError: a value is out of range.

    Example:
        >>> UpdateOptions(precision="bfloat16", accumulate=4).autocast
        torch.bfloat16
    """

    precision: Precision = "float32"
    accumulate: int = 1
    clip_norm: float | None = None
    channels_last: bool = False
    compile: bool | str | Mapping[str, Any] = False
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in _NARROW:
            raise DataError(f"precision must be one of {sorted(_NARROW)}, got {self.precision!r}")
        if self.accumulate < 1:
            raise DataError(f"accumulate counts micro-batches, 1 or more; got {self.accumulate}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise DataError(f"clip_norm must be above 0 and finite, or None; got {self.clip_norm}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise DataError(f"ema is a decay, 0 or more and below 1, or None; got {self.ema}")

    @property
    def autocast(self) -> torch.dtype | None:
        """What to compute in, or None for the weights' own."""
        return _NARROW[self.precision]

    @property
    def compile_arguments(self) -> dict[str, Any] | None:
        """Keyword arguments for `torch.compile`, or None not to compile."""
        if isinstance(self.compile, Mapping):
            return dict(self.compile)
        if isinstance(self.compile, str):
            return {"mode": self.compile}
        return {} if self.compile else None
