"""A cache of other stores' objects on a disk of this machine, shared by its processes."""

from asyncshard.stores.disk_cache.directory import DiskCache
from asyncshard.stores.disk_cache.store import CachedStore

__all__ = ["CachedStore", "DiskCache"]
