"""A schedule's rate as Keras takes it; on TensorFlow it is evaluated within the compiled update."""

from snapcore_keras.schedule import SnapshotSchedule

__all__ = ["SnapshotSchedule"]
