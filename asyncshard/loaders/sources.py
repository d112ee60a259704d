"""Stores that stay open between reads, one for each folder."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from asyncshard.arrays.base import ArrayLibrary
from asyncshard.errors import BudgetError
from asyncshard.loaders.cache import Caching
from asyncshard.loaders.files import open_file
from asyncshard.loaders.options import Options
from asyncshard.pipeline.memory.budget import Account, MemoryBudget
from asyncshard.stores import Store, name_of_file
from asyncshard.tasks.threads import DaemonThreads, wait_to_end

ShardFile = str | os.PathLike[str]
"""A local path or URL."""


class Opened(NamedTuple):
    """What reading a file takes."""

    store: Store
    name: str
    threads: DaemonThreads
    library: ArrayLibrary


@dataclass(slots=True, eq=False)
class _Source:
    """A store that is open, and who reads from it."""

    store: Store
    threads: DaemonThreads
    account: Account | None
    """Of the memory that the store takes, if any."""
    users: int = 0

    async def aclose(self) -> None:
        await self.threads.aclose()
        await self.store.aclose()
        if self.account is not None:
            self.account.close()


class Sources:
    """Open stores. One that nobody uses is closed, unless they `are_kept`."""

    def __init__(self, options: Options, caching: Caching | None, budget: MemoryBudget) -> None:
        self._options = options
        self._caching = caching
        self._budget = budget
        self._sources: dict[str, _Source] = {}
        self.are_kept = False

    @asynccontextmanager
    async def opened(self, path: ShardFile) -> AsyncIterator[Opened]:
        """Open the store of a file's folder, or use the one that is open."""
        folder = key_of(path).rpartition("/")[0]
        source = self._sources.get(folder)
        if source is None:
            store, name = open_file(path, self._options, self._caching)
            source = _Source(store, DaemonThreads(1, "asyncshard-work"), self._account_of(store))
            self._sources[folder] = source
        else:
            name = name_of_file(path)
        source.users += 1
        try:
            library = await source.threads.run(self._options.library)
            yield Opened(source.store, name, source.threads, library)
        finally:
            source.users -= 1
            if not source.users and not self.are_kept:
                if self._sources.get(folder) is source:
                    del self._sources[folder]
                await wait_to_end(asyncio.ensure_future(source.aclose()))

    def _account_of(self, store: Store) -> Account | None:
        if not store.held_bytes:
            return None
        account = self._budget.open_account()
        try:
            account.charge_headers(store.held_bytes, store.url)
        except BudgetError:
            account.close()
            raise
        return account

    async def aclose(self) -> None:
        """Close what nobody uses; the others are closed by their last user."""
        for folder, source in list(self._sources.items()):
            if not source.users:
                del self._sources[folder]
                await source.aclose()


def key_of(path: ShardFile) -> str:
    """Return what a file or directory is called here: its URL, or its absolute path."""
    text = os.fspath(path)
    return text.rstrip("/") if "://" in text else os.path.abspath(text)
