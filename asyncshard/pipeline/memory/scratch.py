"""Scratch within the memory budget: memory for reads that cover several byte ranges."""

from __future__ import annotations

from asyncshard.pipeline.memory.budget import Account
from asyncshard.stores.ranges import Scratch
from asyncshard.tasks.threads import DaemonThreads

_SHARE = 8
"""A scratch takes at most 1/8 of the budget."""
_SLABS = 16
"""A scratch has 16 slabs of the chunk size, if the budget allows so much."""
_LEAST_SLABS = 4
"""A scratch has at least 4 slabs, which are smaller if the budget is small."""
_LEAST_SLAB = 4 << 10
"""A slab has at least 4 KiB; then there may be fewer than 4 slabs."""


def charge_scratch(account: Account, threads: DaemonThreads, *, chunk_size: int, path: str) -> Scratch:
    """Return a scratch with slabs of at most `chunk_size` bytes. It is charged like headers, which never wait.

    Raises
    ------
    BudgetError
        The scratch and the headers of the account exceed the budget. The message names `path`.
    """
    total = min(account.budget.nbytes // _SHARE, _SLABS * chunk_size)
    slab = max(min(chunk_size, total // _LEAST_SLABS), _LEAST_SLAB)
    slabs = max(total // slab, 1)
    account.charge_headers(slab * slabs, path)
    return Scratch(threads, slab, slabs)
