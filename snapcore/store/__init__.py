"""A run on disk: the directory, its members, its manifest and its newest resume point.

The other packages and the adapters import from here, never from the modules inside.
"""

from snapcore.store.aside import move_aside
from snapcore.store.atomic import atomic_write
from snapcore.store.directory import SnapshotStore
from snapcore.store.files import local_path, read_regular
from snapcore.store.manifest import MANIFEST, Member, new_member
from snapcore.store.packing import pack, unpack
from snapcore.store.resume_point import ResumePoint, read_point
from snapcore.store.sealed import seal, unseal
from snapcore.store.tensor_file import host_arrays, map_tensors, read_metadata, tied_names, write_tensor_file
from snapcore.store.tensors import Tensors, check_finite, check_fit, non_finite

__all__ = [
    "MANIFEST",
    "Member",
    "ResumePoint",
    "SnapshotStore",
    "Tensors",
    "atomic_write",
    "check_finite",
    "check_fit",
    "host_arrays",
    "local_path",
    "map_tensors",
    "move_aside",
    "new_member",
    "non_finite",
    "pack",
    "read_metadata",
    "read_point",
    "read_regular",
    "seal",
    "tied_names",
    "unpack",
    "unseal",
    "write_tensor_file",
]
