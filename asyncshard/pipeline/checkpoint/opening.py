"""An opening: the store, the threads and the memory account with which a checkpoint is read, closed together."""

from __future__ import annotations

import asyncio
from typing import Self

from asyncshard.errors import BudgetError
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.stores import Store
from asyncshard.stores.opening import ModelPath, StoreAccess
from asyncshard.tasks.threads import DaemonThreads, wait_to_end


class Opening:
    """An open store, threads for work that must not run on the event loop, and an account of the memory budget.

    The end of ``async with Opening(...) as opening`` closes all three, and a cancel does not interrupt that.

    Parameters
    ----------
    store : Store
    budget : MemoryBudget
    closes_store : bool
        Whether the store is closed, too. A store of the user's own is not.
    threads : int
        The largest number of threads. Each starts when it is first needed.

    Raises
    ------
    BudgetError
        The memory that the store holds exceeds the budget. Nothing has been opened.
    """

    def __init__(self, store: Store, budget: MemoryBudget, *, closes_store: bool = True, threads: int = 1) -> None:
        self.store = store
        self._closes_store = closes_store
        self._is_closed = False
        self.threads = DaemonThreads(threads, "asyncshard-work")
        self.account = budget.open_account()
        try:
            self.account.charge_headers(store.held_bytes, store.url)
        except BudgetError:
            self.account.close()
            raise

    @classmethod
    def of(cls, path: ModelPath, access: StoreAccess, budget: MemoryBudget, *, threads: int = 1) -> Self:
        """Return the opening of a path or URL, or of the user's own store, which is not closed.

        Raises
        ------
        ValueError, TypeError, ImportError
            There is no store for such a path. Nothing has been opened.
        BudgetError
            The memory that the store holds exceeds the budget.
        """
        store = access.open(path)
        return cls(store, budget, closes_store=store is not path, threads=threads)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the store, the account and the threads. A cancel does not interrupt it; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            await wait_to_end(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        try:
            if self._closes_store:
                await self.store.aclose()
        finally:
            try:
                await self.account.aclose(self.threads)
            finally:
                await self.threads.aclose()
