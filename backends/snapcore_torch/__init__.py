"""The PyTorch adapter of snapcore: a scheduler, a run for loops of your own, ensembles, and a managed loop."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("snapcore_torch needs PyTorch: pip install 'snapcore[torch]'", name="torch") from error

from snapcore_torch.distributed import TorchGroup
from snapcore_torch.ensemble import SnapshotEnsemble
from snapcore_torch.run import SnapshotRun
from snapcore_torch.schedule import SnapshotLR

__all__ = ["SnapshotEnsemble", "SnapshotLR", "SnapshotRun", "TorchGroup"]
