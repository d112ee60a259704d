"""Keep the cache's directory within its bytes: the entries that were used longest ago go first."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Container
from typing import NamedTuple

from asyncshard.stores.disk_cache.entry import TEMPORARY

_STALE_S = 3600.0
"""Age of a temporary file whose maker has died."""


class Stored(NamedTuple):
    """One entry as it lies on the disk."""

    used_ns: int
    """When it was last opened or written; the order of eviction."""
    name: str
    nbytes: int
    """Of the disk: an entry is sparse."""


def make_room(directory: str, max_bytes: int, in_use: Container[str]) -> int:
    """Unlink entries until those left take at most `max_bytes`; return what they take.

    Names in use stay, even if they alone take more. Others' files that are open elsewhere stay readable there.

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


def _scan(directory: str) -> list[Stored]:
    """Return all entries, without folders, which are none; temporary files that have been left behind are removed."""
    found = []
    with os.scandir(directory) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                status = file.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    continue
                if not file.name.startswith(TEMPORARY):
                    found.append(Stored(status.st_mtime_ns, file.name, status.st_blocks * 512))
                elif time.time() - status.st_mtime > _STALE_S:
                    os.unlink(file.path)
    return found
