"""The shard cache: shards in memory, within a memory budget that it may share with loads.

Each cached file has an account of the budget, for its header and its tensors. While a request waits for the budget, the
least recently used file is evicted. Tensors of an evicted file that somebody still uses stay in the budget until they
die. If nothing is left to evict, they are handed over, those that were evicted first.
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
    """A snapshot of a shard cache. Sizes are bytes as the budget counts them: headers, and tensors in whole pages."""

    hits: int
    """The number of requests that were answered from memory."""
    misses: int
    """The number of requests that read a file, or waited for a read that another request had begun."""
    evictions: int
    """The number of shards that were evicted to free memory; `evict` and `clear` do not count."""
    shards_cached: int
    """The number of shards that have tensors in memory."""
    bytes_cached: int
    """The bytes of the shards that are in memory or being read."""
    bytes_held: int
    """The bytes of tensors that are no longer cached, and are alive."""
    reads_in_flight: int
    """The number of shards and tensors that are being read now."""


@dataclass(slots=True, eq=False)
class CachedFile:
    """The header and the tensors of one file that are in memory."""

    shard: OpenedFile
    """The file as it was opened, with its header."""
    account: Account
    """The account of the budget for the header and the tensors."""
    tensors: ShardTensors | None = None
    """All tensors of the file, if the whole file was read."""
    single_tensors: dict[str, ShardTensors] = field(default_factory=dict)
    """Tensors that were read one by one: for each name, a mapping with this tensor."""
    pins: int = 0
    """The number of reads in flight. A file with pins is not evicted."""

    def with_name(self, name: str) -> ShardTensors | None:
        """Return a mapping in memory that has a tensor of this name; None if there is none."""
        mappings = (self.tensors, self.single_tensors.get(name))
        return next((tensors for tensors in mappings if tensors is not None and name in tensors), None)

    @property
    def has_tensors(self) -> bool:
        """Whether tensors of the file are in memory."""
        return self.tensors is not None or bool(self.single_tensors)


class ShardCache:
    """The cached files by key. Several threads may use it. It reads nothing: `ShardReader` reads files into it.

    Parameters
    ----------
    budget : MemoryBudget
    max_shards : int or None
        The largest number of files that may have tensors in memory; None for no limit.
    is_strict : bool
        Whether tensors in use never leave the budget: a read for which they leave no room fails (`require_room`).
    """

    def __init__(self, budget: MemoryBudget, max_shards: int | None, *, is_strict: bool) -> None:
        self.budget = budget
        self._max_shards = max_shards
        self._is_strict = is_strict
        # Never held while the budget calls reclaimers: these have locks of their own.
        self._lock = threading.RLock()
        self._files: OrderedDict[str, CachedFile] = OrderedDict()
        self._evicted: list[Account] = []
        """The accounts of evicted files that have tensors alive, handed over or not, in the order of their eviction."""
        self._open_accounts: set[Account] = set()
        self._finalizer = weakref.finalize(self, _abandon, budget, self._open_accounts)
        self._finalizer.atexit = False
        self.hits = self.misses = self.evictions = 0
        budget.add_reclaimer(self)

    def find(self, key: str) -> CachedFile | None:
        """Return a file, and make it the most recently used one; None if it is not cached."""
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
            return file

    def peek(self, key: str) -> CachedFile | None:
        """Return a file, without making it the most recently used one; None if it is not cached."""
        return self._files.get(key)

    def open_account(self) -> Account:
        """Return a new account for memory that belongs to no cached file. `discard` closes it, or the cache's end."""
        account = self.budget.open_account()
        self._open_accounts.add(account)
        return account

    def discard(self, account: Account) -> None:
        """Close an account. Its buffers that are still alive leave the budget."""
        with self._lock:
            if account in self._open_accounts:
                self._open_accounts.remove(account)
                account.close()

    @contextmanager
    def pinned(self, key: str, shard: OpenedFile) -> Iterator[CachedFile]:
        """Add a file to the cache, unless it is there, and keep it from being evicted during the ``with`` block.

        If another version of the file is cached, it is evicted first.

        Raises
        ------
        BudgetError
            The file's header exceeds the budget.
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
        """Evict files until at most `max_shards` have tensors in memory."""
        if self._max_shards is None:
            return
        surplus = sum(file.has_tensors for file in self._files.values()) - self._max_shards
        while surplus > 0 and self._evict_oldest(with_tensors=True):
            surplus -= 1

    def reclaim(self, kind: Reclaimable) -> bool:
        """Evict the least recently used file, or hand over the tensors in use of one evicted file."""
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
        """Drop the tensors and the header of a file that is no longer cached, unless a read is in flight."""
        if file.pins:
            return
        file.tensors = None
        file.single_tensors.clear()
        self._evicted.append(file.account)
        file.account.charge_headers(-file.account.header_bytes, file.shard.path)
        self._sweep()

    def _sweep(self) -> None:
        """Close the accounts of evicted files that have no tensor alive."""
        for account in self._evicted.copy():
            if not account.bytes_alive():
                self._evicted.remove(account)
                self.discard(account)

    def require_room(self, nbytes: int, path: str) -> None:
        """Raise BudgetError if a waiting request of `nbytes` can never be granted beside the tensors in use.

        Without `is_strict` it never raises: tensors in use leave the budget.
        """
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
        """Drop a file; return whether it was cached."""
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
        """Drop all files, and let their tensors that are in use leave the budget."""
        with self._lock:
            self.clear()
            for account in self._evicted:
                self.discard(account)

    def statistics(self, reads_in_flight: int) -> CacheStatistics:
        """Return a snapshot of the cache."""
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
