"""The node's cache of remote objects, as loaders take it and as a user checks it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from asyncshard._core import StopFlag
from asyncshard.extras import require
from asyncshard.stores.base import Store
from asyncshard.stores.local.files import translated
from asyncshard.tasks.threads import DaemonThreads

if TYPE_CHECKING:
    from asyncshard.stores.disk_cache.directory import DiskCache
    from asyncshard.stores.disk_cache.verification import CacheReport

DEFAULT_MAX_GB = 100.0


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

    return DiskCache(cache_dir, max_bytes=int(min((cache_max_gb or DEFAULT_MAX_GB) * (1 << 30), sys.maxsize)))


class Caching(NamedTuple):
    """A cache, and what its use may take of a loader's memory."""

    cache: DiskCache
    write_buffer_bytes: int
    """For blocks on their way to the disk."""

    def wrap(self, store: Store, *, closes_store: bool = True) -> Store:
        """Return a store that reads another one through the cache."""
        from asyncshard.stores.disk_cache.store import CachedStore

        return CachedStore(store, self.cache, closes_store=closes_store, write_buffer_bytes=self.write_buffer_bytes)


async def verify_cache(cache_dir: str | os.PathLike[str]) -> CacheReport:
    """Compare all that a cache holds with its checksums, off the event loop.

    What does not match is dropped, with a warning, and fetched again when it is needed. Loads may go on meanwhile.

    Parameters
    ----------
    cache_dir : str or path
        As it is given to the loaders.

    Returns
    -------
    CacheReport
        How many ``entries``, ``blocks`` and bytes (``nbytes``) are right, and the paths of those ``dropped``.

    Raises
    ------
    ObjectNotFoundError, AccessDeniedError, StoreError
        The directory cannot be read.
    ImportError
        The packages that it needs are not installed.
    """
    cache = make_cache(cache_dir)
    from asyncshard.stores.disk_cache.verification import verify

    stop = StopFlag()
    threads = DaemonThreads(1, "asyncshard-cache-verify")
    try:
        with translated(cache.directory):
            return await threads.run(verify, cache, stop, on_cancel=stop.set)
    finally:
        await threads.aclose()
