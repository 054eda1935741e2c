"""What lies on disk: a run directory, its members, its manifest and its newest resume point.

The other wings and the adapters import from here, never from a file behind this door.
"""

from snapcore.store.atomic import replacing
from snapcore.store.directory import SnapshotStore, move_aside
from snapcore.store.manifest import MANIFEST, Member
from snapcore.store.packing import pack, unpack
from snapcore.store.resume_point import ResumePoint, clear_point, read_point, write_point
from snapcore.store.tensors import Tensors, check_finite, check_fit, map_tensors

__all__ = [
    "MANIFEST",
    "Member",
    "ResumePoint",
    "SnapshotStore",
    "Tensors",
    "check_finite",
    "check_fit",
    "clear_point",
    "map_tensors",
    "move_aside",
    "pack",
    "read_point",
    "replacing",
    "unpack",
    "write_point",
]
