"""Memory of the budget for reads that cover several ranges."""

from __future__ import annotations

from asyncshard.pipeline.memory.budget import Account
from asyncshard.stores.ranges import Scratch
from asyncshard.tasks.threads import DaemonThreads

_SHARE = 8
"""The scratch takes an eighth of the budget at most."""
_SLABS = 16
_LEAST_SLABS = 4
_LEAST_SLAB = 4 << 10


def charge_scratch(account: Account, threads: DaemonThreads, *, chunk_size: int, path: str) -> Scratch:
    """Return a scratch that is charged like headers, which never wait; its slabs are of `chunk_size` bytes at most.

    Raises
    ------
    BudgetError
        It exceeds the budget together with what the account has; `path` is for the message.
    """
    total = min(account.budget.nbytes // _SHARE, _SLABS * chunk_size)
    slab = max(min(chunk_size, total // _LEAST_SLABS), _LEAST_SLAB)
    slabs = max(total // slab, 1)
    account.charge_headers(slab * slabs, path)
    return Scratch(threads, slab, slabs)
