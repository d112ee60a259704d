"""Shards in memory, least recently used first to go, within a memory budget that others may share.

A file's bytes, its header included, have one account of the budget. While a request waits, the least recently used file
is evicted. What somebody still uses of it stays in the budget until it dies, or until nothing else is left to evict:
then it is handed over, the oldest first.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from asyncshard.errors import BudgetError
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.pipeline.memory.budget import Account, MemoryBudget, Reclaimable
from asyncshard.pipeline.shard_cache.tensors import ShardTensors


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot of a cache; sizes in bytes, as the memory budget counts them: headers, and whole pages of tensors."""

    hits: int
    """Requests answered from memory."""
    misses: int
    """Requests that had to read, or to wait for a read that others had begun."""
    evictions: int
    """Shards that gave way to others; not those of `evict` and `clear`."""
    shards_cached: int
    """Files of which tensors are in memory."""
    bytes_cached: int
    """Bytes of the shards in memory, and of those being read."""
    bytes_held: int
    """Bytes of tensors that are no longer cached, and still in use."""
    reads_in_flight: int
    """Shards and tensors being read now."""


@dataclass(slots=True, eq=False)
class CachedFile:
    """What is in memory of one file."""

    shard: OpenedFile
    account: Account
    tensors: ShardTensors | None = None
    """All of them, once the file was read whole."""
    lone: dict[str, ShardTensors] = field(default_factory=dict)
    """Those that were read one by one."""
    pins: int = 0
    """Reads in flight: it is not evicted meanwhile."""

    def with_name(self, name: str) -> ShardTensors | None:
        """Return what has a tensor of this name, if that is in memory."""
        held = (self.tensors, self.lone.get(name))
        return next((tensors for tensors in held if tensors is not None and name in tensors), None)

    @property
    def has_tensors(self) -> bool:
        return self.tensors is not None or bool(self.lone)


class ShardCache:
    """Files by key. May be used from several threads; reads are the business of whoever uses it.

    Parameters
    ----------
    budget : MemoryBudget
    max_shards : int or None
        How many files may have tensors in memory.
    is_strict : bool
        Whether tensors in use never leave the budget: what they block is an error (`require_room`).
    """

    def __init__(self, budget: MemoryBudget, max_shards: int | None, *, is_strict: bool) -> None:
        self.budget = budget
        self._max_shards = max_shards
        self._is_strict = is_strict
        self._lock = threading.RLock()  # never held while the budget asks reclaimers: those have locks of their own
        self._files: OrderedDict[str, CachedFile] = OrderedDict()
        self._evicted: list[Account] = []
        """Accounts of files that are gone, of which something is alive; handed over or not."""
        self._open_accounts: set[Account] = set()
        self._finalizer = weakref.finalize(self, _abandon, budget, self._open_accounts)
        self._finalizer.atexit = False
        self.hits = self.misses = self.evictions = 0
        budget.add_reclaimer(self)

    def find(self, key: str) -> CachedFile | None:
        """Return a file, which is the most recently used one from now on."""
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
            return file

    def peek(self, key: str) -> CachedFile | None:
        """Return a file without using it."""
        return self._files.get(key)

    def open_account(self) -> Account:
        """Begin to count for something beside the files, until `discard`; it ends with the cache, too."""
        account = self.budget.open_account()
        self._open_accounts.add(account)
        return account

    def discard(self, account: Account) -> None:
        """End a count; what is in use of it leaves the budget."""
        with self._lock:
            if account in self._open_accounts:
                self._open_accounts.remove(account)
                account.close()

    @contextmanager
    def pinned(self, key: str, shard: OpenedFile) -> Iterator[CachedFile]:
        """Keep a file from being evicted while it is read. It is added where it is not there, or another is.

        Raises
        ------
        BudgetError
            Its header exceeds the budget.
        """
        file = self._pin(key, shard)
        try:
            self.budget.reclaim_for_waiters()
            yield file
        finally:
            with self._lock:
                file.pins -= 1
                if file not in self._files.values():
                    self._let_go(file)
                self._bound()
            self.budget.reclaim_for_waiters()

    def _pin(self, key: str, shard: OpenedFile) -> CachedFile:
        with self._lock:
            file = self._files.get(key)
            if file is None or not file.shard.is_same(shard):
                account = self.open_account()
                try:
                    account.charge_headers(shard.header.nbytes, shard.path)
                except BudgetError:
                    self.discard(account)
                    raise
                self.evict(key)
                file = self._files[key] = CachedFile(shard, account)
            file.pins += 1
            return file

    def _bound(self) -> None:
        """Evict until no more than `max_shards` have tensors."""
        if self._max_shards is None:
            return
        surplus = sum(file.has_tensors for file in self._files.values()) - self._max_shards
        while surplus > 0 and self._evict_oldest(with_tensors=True):
            surplus -= 1

    def reclaim(self, kind: Reclaimable) -> bool:
        with self._lock:
            if kind is Reclaimable.CACHED:
                return self._evict_oldest(with_tensors=False)
            self._sweep()
            in_use = [account for account in self._evicted if account in self._open_accounts]
            if kind is Reclaimable.IN_USE and in_use and not self._is_strict:
                self.discard(in_use[0])
                return True
            return False

    def _evict_oldest(self, *, with_tensors: bool) -> bool:
        for key, file in self._files.items():
            if not file.pins and (file.has_tensors or not with_tensors):
                del self._files[key]
                self.evictions += file.has_tensors
                self._let_go(file)
                return True
        return False

    def _let_go(self, file: CachedFile) -> None:
        """Drop what the cache has of a file that is no longer in it; reads in flight keep theirs until they end."""
        if file.pins:
            return
        file.tensors = None
        file.lone.clear()
        self._evicted.append(file.account)
        file.account.charge_headers(-file.account.header_bytes, file.shard.path)
        self._sweep()

    def _sweep(self) -> None:
        """Forget the accounts of which nothing is alive."""
        for account in self._evicted.copy():
            if not account.bytes_alive():
                self._evicted.remove(account)
                self.discard(account)

    def require_room(self, nbytes: int, path: str) -> None:
        """Raise BudgetError for a request that waits and that tensors in use will never let through."""
        with self._lock:
            in_use = sum(account.used for account in self._evicted if account in self._open_accounts)
        if self._is_strict and in_use and in_use + nbytes > self.budget.nbytes:
            raise BudgetError(
                f"{path}: tensors of evicted shards that are still in use take {in_use:,} bytes; this read needs "
                f"{nbytes:,} and the memory budget is {self.budget.nbytes:,} bytes: let go of them earlier, raise "
                "memory_budget_mb, or pass strict_budget=False",
                path=path,
                needed_bytes=nbytes,
                budget_bytes=self.budget.nbytes,
            )

    def evict(self, key: str) -> bool:
        """Drop a file; whether it was there."""
        with self._lock:
            file = self._files.pop(key, None)
            if file is None:
                return False
            self._let_go(file)
        self.budget.collect()
        return True

    def clear(self) -> None:
        """Drop all files."""
        for key in list(self._files):
            self.evict(key)

    def release(self) -> None:
        """Drop all files, and let what is in use leave the budget."""
        with self._lock:
            self.clear()
            for account in self._evicted:
                self.discard(account)

    def statistics(self, reads_in_flight: int) -> CacheStatistics:
        """Return a snapshot."""
        with self._lock:
            self._sweep()
            files = self._files.values()
            return CacheStatistics(
                hits=self.hits,
                misses=self.misses,
                evictions=self.evictions,
                shards_cached=sum(file.has_tensors for file in files),
                bytes_cached=sum(file.account.header_bytes + file.account.bytes_alive() for file in files),
                bytes_held=sum(account.bytes_alive() for account in self._evicted),
                reads_in_flight=reads_in_flight,
            )


def _abandon(budget: MemoryBudget, accounts: set[Account]) -> None:
    for account in accounts:
        budget.abandon(account)
