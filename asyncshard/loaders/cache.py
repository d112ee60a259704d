"""The check of a cache on disk, as a user asks for it."""

from __future__ import annotations

import os

from asyncshard._core import StopFlag
from asyncshard.stores.disk_cache.report import CacheReport
from asyncshard.stores.local.files import translated
from asyncshard.stores.opening import make_cache
from asyncshard.tasks.threads import DaemonThreads


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
