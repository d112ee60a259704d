"""Verify a disk cache: compare all that it holds with checksums."""

from __future__ import annotations

import os

from asyncshard._core import StopFlag
from asyncshard.stores.disk_cache.report import CacheReport
from asyncshard.stores.local.files import translated
from asyncshard.stores.opening import make_cache
from asyncshard.tasks.threads import DaemonThreads


async def verify_cache(cache_dir: str | os.PathLike[str]) -> CacheReport:
    """Compare every block of a disk cache with its checksum, off the event loop.

    Blocks that do not match are dropped, with a warning, and fetched again when they are needed. Loads may use the
    cache at the same time.

    Parameters
    ----------
    cache_dir : str or path
        The directory of the cache, as it is passed to the loaders.

    Returns
    -------
    CacheReport
        How many ``entries``, ``blocks`` and bytes (``nbytes``) are right, and the paths of entries that were
        ``dropped``.

    Raises
    ------
    ObjectNotFoundError, AccessDeniedError, StoreError
        The directory cannot be read.
    ImportError
        The packages of the extra ``cache`` are not installed.
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
