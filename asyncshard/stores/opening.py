"""Stores as a loader opens them: from a path or URL, with its options, and through its cache on disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncshard.extras import require
from asyncshard.stores import Store, file_from_url, from_url

if TYPE_CHECKING:
    from asyncshard.stores.disk_cache.directory import DiskCache

ModelPath = str | os.PathLike[str] | Store
"""A local path or URL; or a store of the user's own, which a load leaves open."""

DEFAULT_CACHE_MAX_GB = 100.0
"""Size of a cache on disk, in GiB, where the user gives none."""


@dataclass(frozen=True, slots=True)
class StoreAccess:
    """How a loader reaches its files."""

    max_workers: int | None = None
    """Reads in flight; None for the store's own number."""
    page_cache: str = "keep"
    """Whether the kernel keeps local files in its page cache after they were read: "keep" or "drop"."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # it may hold secrets
    """The store's constructor arguments."""
    cache: DiskCache | None = None
    """A cache on disk through which stores are read."""
    write_buffer_bytes: int = 0
    """Memory for blocks on their way to that cache's disk."""

    def open(self, path: ModelPath) -> Store:
        """Return the store for a path, or the user's own store, read through the cache where there is one.

        It does no I/O. The caller closes what is returned, unless it is the very store that was given.

        Raises
        ------
        ValueError, TypeError, ImportError
            As `asyncshard.stores.from_url`.
        """
        if isinstance(path, Store):
            return path if self.cache is None else self._cached(path, closes_store=False)
        store = from_url(path, max_workers=self.max_workers, page_cache=self.page_cache, **self.storage_options)
        return store if self.cache is None else self._cached(store)

    def open_folder(self, file: str | os.PathLike[str]) -> tuple[Store, str]:
        """Return the store of the folder that a file is in, and the file's name there. It does no I/O."""
        store, name = file_from_url(
            file, max_workers=self.max_workers, page_cache=self.page_cache, **self.storage_options
        )
        return (store if self.cache is None else self._cached(store)), name

    def _cached(self, store: Store, *, closes_store: bool = True) -> Store:
        from asyncshard.stores.disk_cache.store import CachedStore

        assert self.cache is not None
        return CachedStore(store, self.cache, closes_store=closes_store, write_buffer_bytes=self.write_buffer_bytes)


def make_cache(cache_dir: str | os.PathLike[str], cache_max_gb: float | None = None) -> DiskCache:
    """Return the cache in a directory, of which nothing is touched yet.

    Raises
    ------
    ImportError
        The packages that it needs are not installed.
    TypeError
        A path of bytes.
    """
    if not isinstance(os.fspath(cache_dir), str):
        raise TypeError(f"cache_dir must be a path of str, not {os.fspath(cache_dir)!r}")
    require("cache_dir", "filelock", "xxhash")
    from asyncshard.stores.disk_cache.directory import DiskCache

    return DiskCache(cache_dir, max_bytes=int(min((cache_max_gb or DEFAULT_CACHE_MAX_GB) * (1 << 30), sys.maxsize)))
