"""The Keras adapter of snapcore: a schedule, a callback for `fit`, ensembles, and a managed loop, on any backend."""

try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise ModuleNotFoundError("snapcore_keras needs Keras: pip install 'snapcore[keras]'", name="keras") from error
    if error.name not in ("tensorflow", "jax", "torch"):
        raise
    raise ModuleNotFoundError(
        f"Keras is to run on {error.name}, which is not installed: pip install 'snapcore[{error.name}]', or name one "
        "that is in the environment variable KERAS_BACKEND: tensorflow, jax or torch",
        name=error.name,
    ) from error

from snapcore_keras.callback import SnapshotCallback
from snapcore_keras.ensemble import SnapshotEnsemble
from snapcore_keras.schedule import SnapshotSchedule

__all__ = ["SnapshotCallback", "SnapshotEnsemble", "SnapshotSchedule"]
