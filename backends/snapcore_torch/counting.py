"""What counts as an update: the optimizer's own steps, without those that a loss scaler skipped."""

from torch.optim import Optimizer


def inner(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that does the updates, out of wrappers such as Accelerate's, which run no hooks."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = wrapped
    return optimizer


class UpdateCount:
    """Count the real updates of an optimizer.

    A step that a `GradScaler` skipped is none. Steps replayed from a CUDA graph run no Python and cannot be seen.

    Arguments:
        optimizer: counted from now on, until `remove`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.waiting = 0
        """Updates since the last `take`."""
        self._hook = optimizer.register_step_post_hook(self._note)

    def take(self) -> int:
        """Return the updates since the last call."""
        waiting, self.waiting = self.waiting, 0
        return waiting

    def remove(self) -> None:
        """Count no more."""
        self._hook.remove()

    def _note(self, optimizer: Optimizer, *_: object) -> None:
        # A fused optimizer is called even when the scaler found infinities, and skips the update itself.
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is None or not skipped.item():
            self.waiting += 1
