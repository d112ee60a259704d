"""Files as the user names them: the stores they are in, which ones a load takes, and the header of one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from asyncshard.errors import NotRegularFileError
from asyncshard.format.header import Header
from asyncshard.loaders.cache import Caching
from asyncshard.loaders.options import Options
from asyncshard.pipeline.checkpoint.checkpoint import Selection, choose_files
from asyncshard.pipeline.checkpoint.opened_file import read_header_of
from asyncshard.stores import Store, file_from_url, from_url
from asyncshard.tasks.threads import DaemonThreads, wait_to_end

ModelPath = str | os.PathLike[str] | Store
"""A local path or URL; or a store of one's own, which a load leaves open."""


def open_store(path: ModelPath, options: Options, caching: Caching | None = None) -> Store:
    """Return the store for a path, or the one that was given, which reads through the cache if there is one.

    The caller closes it, unless it is the one that was given.
    """
    if isinstance(path, Store):
        return path if caching is None else caching.wrap(path, closes_store=False)
    store = from_url(path, max_workers=options.max_workers, page_cache=options.page_cache, **options.storage_options)
    return store if caching is None else caching.wrap(store)


def open_file(path: str | os.PathLike[str], options: Options, caching: Caching | None = None) -> tuple[Store, str]:
    """Return the store of a file's folder, and the file's name there."""
    store, name = file_from_url(
        path, max_workers=options.max_workers, page_cache=options.page_cache, **options.storage_options
    )
    return (store if caching is None else caching.wrap(store)), name


async def discover(path: ModelPath, selection: Selection, options: Options) -> list[str]:
    """Return the full paths of the files to load, in delivery order."""
    store = open_store(path, options)
    threads = DaemonThreads(1, "asyncshard-work")
    try:
        found = await choose_files(store, selection, threads)
        return [store.path_of(name) for name in found.files]
    finally:
        await threads.aclose()
        if store is not path:
            await wait_to_end(asyncio.ensure_future(store.aclose()))


async def read_header(
    path: str | os.PathLike[str],
    *,
    max_header_bytes: int | None = None,
    max_tensors: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Header:
    """Read and validate the header of one file, off the event loop.

    Parameters
    ----------
    path : str or path
        A local path or URL of one ``.safetensors`` file.
    max_header_bytes, max_tensors : int, optional
        Refuse a larger header, before it is read or parsed.
    storage_options : mapping, optional
        The store's constructor arguments.

    Raises
    ------
    FormatError
        The header breaks a rule of the format; the message says which, and where.
    ObjectNotFoundError, AccessDeniedError, NotRegularFileError, StoreError
    """
    store = from_url(path, **(storage_options or {}))
    threads = DaemonThreads(1, "asyncshard-work")
    try:
        listing = await store.list()
        if not listing.is_file:
            raise NotRegularFileError(f"{store.url}: this is a directory; name one file", path=store.url)
        shard = await read_header_of(
            store, listing.names[0], threads, max_header_bytes=max_header_bytes, max_tensors=max_tensors
        )
        return shard.header
    finally:
        await threads.aclose()
        await wait_to_end(asyncio.ensure_future(store.aclose()))
