"""Eviction of the entries that were used longest ago, to keep a cache within its bytes."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Container
from typing import NamedTuple

from asyncshard.stores.disk_cache.entry import TEMPORARY

_STALE_S = 3600.0
"""A temporary file is removed after one hour: whoever made it has died."""


class EntryFile(NamedTuple):
    """The file of one entry."""

    used_ns: int
    """Time at which the entry was last used; eviction goes in this order."""
    name: str
    nbytes: int
    """Bytes that it takes on the disk; entries are sparse."""


def make_room(directory: str, max_bytes: int, in_use: Container[str]) -> int:
    """Remove entries until the others take at most `max_bytes`. Return the bytes that they take.

    Entries whose names are in use stay, even if they alone take more. A removed file stays readable for processes that
    have it open.

    Raises
    ------
    OSError
    """
    entries = sorted(_scan(directory))
    left = sum(entry.nbytes for entry in entries)
    for entry in entries:
        if left <= max_bytes:
            break
        if entry.name not in in_use:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, entry.name))
            left -= entry.nbytes
    return left


def _scan(directory: str) -> list[EntryFile]:
    """Return all entries, and remove temporary files that were left behind."""
    found = []
    with os.scandir(directory) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                status = file.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    continue
                if not file.name.startswith(TEMPORARY):
                    found.append(EntryFile(status.st_mtime_ns, file.name, status.st_blocks * 512))
                elif time.time() - status.st_mtime > _STALE_S:
                    os.unlink(file.path)
    return found
