"""The JAX adapter of snapcore: an optax schedule, a run for loops of your own, ensembles, and a managed loop."""

try:
    import jax  # noqa: F401
    import optax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("jax", "jaxlib", "optax"):
        raise
    raise ModuleNotFoundError(
        "snapcore_jax needs JAX and optax: pip install 'snapcore[jax]'", name=error.name
    ) from error

from snapcore_jax.ensemble import SnapshotEnsemble
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

__all__ = ["SnapshotEnsemble", "SnapshotRun", "snapshot_schedule"]
