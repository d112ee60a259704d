"""Read the header of one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from asyncshard.errors import NotRegularFileError
from asyncshard.format.header import Header, HeaderLimits
from asyncshard.pipeline.checkpoint.opened_file import read_header_of
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.stores.opening import StoreAccess


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
        Limits of the header. A header with more bytes or more tensors is an error, before it is read or parsed.
    storage_options : mapping, optional
        Arguments for the constructor of the store.

    Raises
    ------
    FormatError
        The header breaks a rule of the format. The message says which rule, and at which offset.
    ObjectNotFoundError, AccessDeniedError, NotRegularFileError, StoreError
    """
    access = StoreAccess(storage_options=storage_options or {})
    async with Opening.of(path, access, MemoryBudget(_UNBOUNDED_MB)) as opening:
        listing = await opening.store.list()
        if not listing.is_file:
            url = opening.store.url
            raise NotRegularFileError(f"{url}: this is a directory; name one file", path=url)
        opened = await read_header_of(
            opening.store,
            listing.names[0],
            opening.threads,
            HeaderLimits(max_header_bytes, max_tensors),
            opening.account,
        )
        return opened.header


_UNBOUNDED_MB = 1 << 20
"""A budget of 1 TiB bounds nothing: the caller has asked for this one header."""
