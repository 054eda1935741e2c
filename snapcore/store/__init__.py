"""A run on disk: the directory, its members, its manifest and its newest resume point.

The other packages and the adapters import from here, never from the modules inside.
"""

from snapcore.store.atomic import atomic_write
from snapcore.store.directory import SnapshotStore, move_aside
from snapcore.store.manifest import MANIFEST, Member, new_member
from snapcore.store.packing import pack, unpack
from snapcore.store.resume_point import ResumePoint, clear_point, read_point, write_point
from snapcore.store.tensors import Tensors, check_finite, check_fit, map_tensors

__all__ = [
    "MANIFEST",
    "Member",
    "ResumePoint",
    "SnapshotStore",
    "Tensors",
    "atomic_write",
    "check_finite",
    "check_fit",
    "clear_point",
    "map_tensors",
    "move_aside",
    "new_member",
    "pack",
    "read_point",
    "unpack",
    "write_point",
]
