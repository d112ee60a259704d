"""A store, threads, and an account of the budget, opened and closed together: what looking into a checkpoint takes."""

from __future__ import annotations

import asyncio
from typing import Self

from asyncshard.errors import BudgetError
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.stores import Store
from asyncshard.stores.opening import ModelPath, StoreAccess
from asyncshard.tasks.threads import DaemonThreads, wait_to_end


class Opening:
    """A store that is open, threads for what must not run on the event loop, and an account of the memory in use.

    ``async with Opening(...) as opening`` closes all three at its end, whoever cancels what meanwhile.

    Parameters
    ----------
    store : Store
    budget : MemoryBudget
    closes_store : bool
        False leaves the store open.
    threads : int
        How many threads there are at most; each starts when it is first needed.

    Raises
    ------
    BudgetError
        The budget cannot hold what the store takes; nothing has been read, and the store is as good as closed.
    """

    def __init__(self, store: Store, budget: MemoryBudget, *, closes_store: bool = True, threads: int = 1) -> None:
        self.store = store
        self._closes_store = closes_store
        self.threads = DaemonThreads(threads, "asyncshard-work")
        self.account = budget.open_account()
        try:
            self.account.charge_headers(store.held_bytes, store.url)
        except BudgetError:
            self.account.close()
            raise

    @classmethod
    def of(cls, path: ModelPath, access: StoreAccess, budget: MemoryBudget, *, threads: int = 1) -> Self:
        """Return the opening of a path or URL, or of the user's own store, which stays open.

        Raises
        ------
        ValueError, TypeError, ImportError
            There is no store for such a path; nothing has been opened.
        BudgetError
            The budget cannot hold what the store takes.
        """
        store = access.open(path)
        return cls(store, budget, closes_store=store is not path, threads=threads)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the store, the account and the threads; to the end, even when cancelled."""
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
