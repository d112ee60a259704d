"""Open stores, one for each folder, which several reads share and which may stay open between reads."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from asyncshard.arrays.frameworks import load_library
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.pipeline.shard_cache.shard_reader import OpenedFolder
from asyncshard.stores import name_of_file
from asyncshard.stores.opening import StoreAccess

ShardFile = str | os.PathLike[str]
"""A local path or URL."""


@dataclass(slots=True, eq=False)
class _Source:
    """An open folder."""

    opening: Opening
    users: int = 0
    """The number of reads that use the folder."""


class Sources:
    """The open stores, one for each folder. A store that no read uses is closed, unless `are_kept`."""

    def __init__(self, access: StoreAccess, framework: str, budget: MemoryBudget) -> None:
        self._access = access
        self._framework = framework
        self._budget = budget
        self._sources: dict[str, _Source] = {}
        self.are_kept = False
        """Whether stores stay open when no read uses them."""

    @asynccontextmanager
    async def opened(self, path: ShardFile) -> AsyncIterator[OpenedFolder]:
        """Open the store of a file's folder, unless it is open, for the duration of the ``async with``."""
        folder = key_of(path).rpartition("/")[0]
        source = self._sources.get(folder)
        if source is None:
            store, name = self._access.open_folder(path)
            source = self._sources[folder] = _Source(Opening(store, self._budget))
        else:
            name = name_of_file(path)
        source.users += 1
        try:
            opening = source.opening
            library = await opening.threads.run(load_library, self._framework)
            yield OpenedFolder(opening.store, name, opening.threads, library)
        finally:
            source.users -= 1
            if not source.users and not self.are_kept:
                if self._sources.get(folder) is source:
                    del self._sources[folder]
                await source.opening.aclose()

    async def aclose(self) -> None:
        """Close the stores that no read uses. The last read that uses a store closes it, unless `are_kept`."""
        for folder, source in list(self._sources.items()):
            if not source.users:
                del self._sources[folder]
                await source.opening.aclose()


def key_of(path: ShardFile) -> str:
    """Return the key of a file or directory: its URL without a slash at the end, or its absolute path."""
    text = os.fspath(path)
    return text.rstrip("/") if "://" in text else os.path.abspath(text)
