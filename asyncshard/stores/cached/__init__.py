"""A cache of other stores' objects on a disk of this machine, shared by its processes."""

from asyncshard.stores.cached.directory import DiskCache
from asyncshard.stores.cached.store import CachedStore

__all__ = ["CachedStore", "DiskCache"]
