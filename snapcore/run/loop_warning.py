"""Warnings of what a loop does, at the loop's own line: that is where it can be mended."""

import sys
import warnings

from snapcore.errors import CycleWarning

_ENTRIES = ("Recorder.record", "Recorder.finish", "Recorder.batches", "Recorder.epochs_of")


def warn_at_loop(message: str, category: type[UserWarning] = CycleWarning) -> None:
    """Warn so that the warning points at the line of the loop that has called snapcore."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_qualname not in _ENTRIES:
        frame, level = frame.f_back, level + 1
    # What has called the recorder is an adapter, whatever its name; what calls that may be snapcore's own too.
    frame, level = frame.f_back or frame, level + 1
    frame, level = frame.f_back or frame, level + 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("snapcore"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
