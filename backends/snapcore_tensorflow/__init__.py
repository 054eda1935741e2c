"""The TensorFlow adapter of snapcore: a schedule, a run for loops of your own, ensembles, and a managed loop."""

from snapcore import BackendNotFoundError

try:
    import keras
    import tensorflow  # noqa: F401
except ModuleNotFoundError as error:
    if error.name in ("jax", "torch"):
        raise BackendNotFoundError(
            f"snapcore_tensorflow needs Keras to run on TensorFlow, and it is to run on {error.name}: set the "
            "environment variable KERAS_BACKEND=tensorflow before Keras is imported"
        ) from error
    if error.name not in ("tensorflow", "keras"):
        raise
    raise ModuleNotFoundError(
        "snapcore_tensorflow needs TensorFlow: pip install 'snapcore[tensorflow]'", name=error.name
    ) from error

if keras.backend.backend() != "tensorflow":
    raise BackendNotFoundError(
        f"snapcore_tensorflow needs Keras to run on TensorFlow, and it runs on {keras.backend.backend()}: set the "
        "environment variable KERAS_BACKEND=tensorflow before Keras is imported"
    )

from snapcore_tensorflow.ensemble import SnapshotEnsemble
from snapcore_tensorflow.run import SnapshotRun
from snapcore_tensorflow.schedule import SnapshotSchedule

__all__ = ["SnapshotEnsemble", "SnapshotRun", "SnapshotSchedule"]
