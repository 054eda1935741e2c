"""PyTorch's data loaders that keep their workers, and what an evaluation with one does to a resumed run."""

import gc
import sys
from typing import Any

from snapcore.run.batches import parts
from snapcore.run.loop_warning import warn_at_loop


def warn_of_kept_workers(walked: object) -> None:
    """Warn of a loader, other than the one about to be walked, whose first walk alone draws from the global generator.

    It has `persistent_workers=True`, no generator, and no workers yet. If it evaluates between epochs, it draws in a
    resumed process where it did not draw in the run that was never stopped. PyTorch is not imported for it.
    """
    torch_data = sys.modules.get("torch.utils.data")
    if torch_data is None:
        return
    used = {id(part) for part in parts(walked)}
    for each in gc.get_objects():
        if issubclass(type(each), torch_data.DataLoader) and id(each) not in used and _draws_once(each):
            warn_at_loop(
                "a DataLoader with persistent_workers=True draws a seed on its first walk alone: if it evaluates "
                "between epochs, a resumed run is another one. Give it generator=torch.Generator(), or leave that out",
                UserWarning,
            )
            return


def _draws_once(loader: Any) -> bool:
    # A subclass whose constructor is still running, or never asked PyTorch's, has none of these.
    asked = getattr(loader, "persistent_workers", False)
    return asked and getattr(loader, "generator", loader) is None and getattr(loader, "_iterator", loader) is None
