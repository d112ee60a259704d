"""The memory budget: bytes are reserved before a read starts, and come back when the last view of them dies.

Each stream has an `Account`. An account takes from the budget the larger of two numbers: its floor (the bytes that its
largest read item needs, so that the stream can always go on) and the bytes that its buffers use. The bytes of headers
are added to that. A request within the floor is granted at once. All other requests stand in one queue; each is granted
as a whole, in the order of the queue. Floors are requested in the same queue, so two streams that each need more than
half of the budget run one after the other.

A buffer is *used* from `Account.allocate` until its lease dies or until it is handed over. A buffer that is handed over
leaves the budget, and counts as *held* by the consumer. When a stream ends, all its buffers that are still alive are
handed over.

While a request waits, the `Reclaimer` objects (caches, streams that have read ahead) are asked to free memory.

Longer than 300 lines: the budget, its accounts and its queue change together, under one lock.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from asyncshard._core import Lease, ReturnList
from asyncshard.errors import BudgetError
from asyncshard.pipeline.memory.arena import Arena, Extent, round_up
from asyncshard.tasks.threads import DaemonThreads

MIB = 1 << 20


@dataclass(slots=True, eq=False)
class _Buffer:
    """The memory of one lease."""

    account: Account
    extent: Extent
    charge: int
    """Bytes that the buffer takes of the budget: its size, rounded up to pages."""
    is_held: bool = False
    """Whether the buffer was handed over to the consumer."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request in the budget's queue. Its methods are called under the budget's lock."""

    account: Account
    nbytes: int
    is_floor: bool
    """Whether the request is for the account's floor, rather than for a buffer."""
    loop: asyncio.AbstractEventLoop
    """The event loop of the task that waits."""
    future: asyncio.Future[None]
    """Done when the request is granted."""
    is_urgent: bool
    """Whether nothing else can unblock the request, so that tensors in use are handed over for it."""
    is_granted: bool = False

    def is_within_floor(self) -> bool:
        return not self.is_floor and self.account.used + self.nbytes <= self.account.floor

    def grant(self) -> None:
        if self.is_floor:
            self.account.floor = self.nbytes
            self.account.is_admitted = True
        else:
            self.account.used += self.nbytes
        self.account.is_waiting = False
        self.is_granted = True

    def take_back(self) -> None:
        if self.is_floor:
            self.account.floor = 0
            self.account.is_admitted = False
        else:
            self.account.used -= self.nbytes
        self.is_granted = False

    def tell(self) -> bool:
        """Wake the waiting task in its own event loop; return False if that loop has closed."""
        try:
            self.loop.call_soon_threadsafe(_set_done, self.future)
        except RuntimeError:
            return False
        return True


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Reclaimable(IntEnum):
    """The kinds of memory that are freed for a request that waits, in the order in which they are freed.

    Cached memory is freed for every request, the other kinds only for an urgent one.
    """

    CACHED = 0
    """Memory of a cache, which nobody uses now."""
    READ_AHEAD = 1
    """A read item that is ready while its consumer is busy elsewhere. It is read again later."""
    IN_USE = 2
    """Memory that somebody uses. It cannot be freed: it is handed over, and leaves the budget."""


class Reclaimer(Protocol):
    """An object that has memory of a budget, and can free it when a request waits."""

    def reclaim(self, kind: Reclaimable) -> bool:
        """Free one piece of memory of this kind; return False if there is none.

        It is called from any thread, without the budget's lock.
        """


class MemoryBudget:
    """A bound on the bytes that loaders hold for data that they have read, are reading or have cached.

    Several loaders, in several threads and event loops, may share one budget (``budget=``). A pickled budget keeps its
    size; the copy is another budget.

    Parameters
    ----------
    memory_budget_mb : float
        Size in units of 2**20 bytes.
    """

    def __init__(self, memory_budget_mb: float) -> None:
        if isinstance(memory_budget_mb, bool) or not isinstance(memory_budget_mb, int | float):
            raise TypeError(f"memory_budget_mb must be a number of MiB, not {memory_budget_mb!r}")
        if not 0 < memory_budget_mb < 1 << 30:
            raise ValueError(f"memory_budget_mb must be above 0 and finite, not {memory_budget_mb!r}")
        self.memory_budget_mb = memory_budget_mb
        self.nbytes = max(int(memory_budget_mb * MIB), 1)
        self._lock = threading.Lock()
        self._arena = Arena(self.nbytes)
        self._buffers: dict[int, _Buffer] = {}
        self._tokens = itertools.count()
        self._accounts: list[Account] = []
        self._waiters: list[_Waiter] = []
        self._held = 0
        self._reclaimers: weakref.WeakSet[Reclaimer] = weakref.WeakSet()
        self._abandoned: list[Account] = []
        """Accounts whose owner was dropped without closing the account."""
        self._returns = ReturnList()
        self._returns.wake = self._wake
        self._returns.discards = True

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryBudget, (self.memory_budget_mb,)

    def __repr__(self) -> str:
        return f"MemoryBudget({self.memory_budget_mb!r})"

    @property
    def bytes_used(self) -> int:
        """Bytes that are charged to the budget now.

        They belong to headers, to buffers that are being read or are ready, and to delivered tensors that are alive.
        """
        with self._lock:
            self._settle()
            return sum(account.header_bytes + account.used for account in self._accounts)

    @property
    def bytes_held(self) -> int:
        """Bytes of delivered tensors that have left the budget and are still alive."""
        with self._lock:
            self._settle()
            return self._held

    def open_account(self) -> Account:
        """Return a new account. Its owner must close it."""
        account = Account(self)
        with self._lock:
            self._accounts.append(account)
            self._returns.discards = False
        return account

    def collect(self) -> None:
        """Take back the buffers whose leases have died, and grant the requests that now fit."""
        with self._lock:
            self._settle()
            self._grant()

    def add_reclaimer(self, reclaimer: Reclaimer) -> None:
        """Call ``reclaimer.reclaim`` when a request waits, for as long as `reclaimer` lives."""
        self._reclaimers.add(reclaimer)

    def reclaim_for_waiters(self, *, is_urgent: bool = False) -> None:
        """Free reclaimable memory until no request waits and the headers fit into the budget.

        Call it after making memory reclaimable: requests that were waiting before have found nothing to reclaim. With
        `is_urgent`, or if an urgent request waits, not only cached memory is reclaimed.
        """
        while self._is_short():
            is_urgent = is_urgent or any(waiter.is_urgent for waiter in self._waiters.copy())
            if not self._reclaim(tuple(Reclaimable) if is_urgent else (Reclaimable.CACHED,)):
                return

    def _reclaim(self, kinds: Sequence[Reclaimable]) -> bool:
        reclaimers = list(self._reclaimers)
        return any(reclaimer.reclaim(kind) for kind in kinds for reclaimer in reclaimers)

    def _is_short(self) -> bool:
        with self._lock:
            self._settle()
            self._grant()
            return bool(self._waiters) or sum(account.committed for account in self._accounts) > self.nbytes

    def abandon(self, account: Account) -> None:
        """Close an account soon. A finaliser calls this, in any thread and at any time, so it takes no lock."""
        self._abandoned.append(account)
        self._wake()  # a waiting request may get the memory of this account

    def trim(self) -> None:
        """Give unused pages back to the system if no account is open. This is slow: call it off the event loop."""
        self._discard(self._take_idle())

    def _take_idle(self) -> list[Extent]:
        with self._lock:
            self._settle()
            return [] if self._accounts else self._arena.take_idle(0)

    def _wake(self) -> None:
        """Have the waiting requests looked at again. A deallocator calls this, so it takes no lock."""
        for waiter in self._waiters.copy():
            try:
                waiter.loop.call_soon_threadsafe(self.collect)
            except RuntimeError:  # that loop has closed; the next waiter's may be open
                continue
            return

    def _discard(self, idle: list[Extent]) -> None:
        for extent in idle:
            extent.region.discard(extent.start, extent.stop)
        if idle:
            with self._lock:
                for extent in idle:
                    self._arena.free(extent, is_touched=False)

    # The methods below are called with the lock held.

    def _settle(self) -> None:
        self._collect()
        while self._abandoned:
            self._close(self._abandoned.pop())

    def _collect(self) -> None:
        for token in self._returns.collect():
            buffer = self._buffers.pop(token)
            account = buffer.account
            del account.buffers[token]
            if buffer.is_held:
                account.held -= buffer.charge
                self._held -= buffer.charge
            else:
                account.used -= buffer.charge
            self._arena.free(buffer.extent)

    def _can_grant(self, waiter: _Waiter) -> bool:
        taken = sum(account.committed for account in self._accounts)
        if waiter.is_floor:
            # Headers alone keep nobody out: where no stream has been admitted, the first in the queue is.
            is_alone = not any(account.is_admitted or account.used for account in self._accounts)
            return is_alone or taken + waiter.nbytes <= self.nbytes
        account = waiter.account
        more = max(account.used + waiter.nbytes, account.floor) - max(account.used, account.floor)
        return more == 0 or taken + more <= self.nbytes

    def _grant(self) -> None:
        is_blocked = False
        for waiter in self._waiters.copy():
            if (waiter.is_within_floor() or not is_blocked) and self._can_grant(waiter):
                self._waiters.remove(waiter)
                waiter.grant()
                if not waiter.tell():
                    waiter.take_back()
            else:
                is_blocked = True
        self._returns.is_awaited = bool(self._waiters)

    def _close(self, account: Account) -> None:
        for buffer in account.buffers.values():
            if not buffer.is_held:
                account._mark_held(buffer)
        account.floor = account.header_bytes = 0
        account.is_admitted = False
        self._accounts.remove(account)
        self._returns.discards = not self._accounts

    async def _reserve(
        self,
        account: Account,
        nbytes: int,
        *,
        is_floor: bool,
        is_urgent: bool,
        on_wait: Callable[[], object] | None,
    ) -> None:
        """Wait for a grant. If a cancel and a grant meet, the cancel wins, and the next request gets the memory."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(account, nbytes, is_floor, loop, loop.create_future(), is_urgent)
        with self._lock:
            self._settle()
            self._waiters.append(waiter)
            self._returns.is_awaited = True
            self._settle()  # again: a lease that died before the line above told nobody
            self._grant()
            if waiter.is_granted:
                return
        try:
            self.reclaim_for_waiters()
            if on_wait is not None and not waiter.is_granted:
                on_wait()
            await waiter.future
        except BaseException:
            with self._lock:
                if waiter.is_granted:
                    waiter.take_back()
                elif waiter in self._waiters:  # not so where its loop had closed when its turn came
                    self._waiters.remove(waiter)
                self._settle()
                self._grant()
            raise


@dataclass(slots=True, eq=False)
class Account:
    """The bytes that one owner, such as a stream or a cached file, has of a budget."""

    budget: MemoryBudget
    header_bytes: int = 0
    """Bytes of headers, and of other memory that is charged from beginning to end."""
    floor: int = 0
    """Bytes that are set aside for the account, whether it uses them or not."""
    is_admitted: bool = False
    """Whether the account's request for a floor was granted."""
    used: int = 0
    """Bytes of the account's buffers that are in the budget."""
    held: int = 0
    """Bytes of the account's buffers that were handed over and are alive."""
    wait_s: float = 0.0
    """Seconds that the account's requests have waited."""
    is_waiting: bool = False
    """Whether a request of the account stands in the queue. False as soon as the request is granted, even if the task
    that made it has not run yet."""
    buffers: dict[int, _Buffer] = field(default_factory=dict)
    """The account's buffers that are alive, oldest first, by the token of their lease."""

    def __repr__(self) -> str:
        # It takes no lock, which the caller may hold: buffers that have just died may still count.
        facts = [f"{_megabytes(self.header_bytes + self.used)} used", f"{_megabytes(self.held)} held"]
        waiting = sum(waiter.nbytes for waiter in self.budget._waiters.copy() if waiter.account is self)
        if waiting:
            facts.append(f"waiting for {_megabytes(waiting)}")
        if self not in self.budget._accounts:
            facts.append("closed")
        return f"<Account of {self.budget.memory_budget_mb:g} MiB: {', '.join(facts)}>"

    @property
    def committed(self) -> int:
        """Bytes that the account takes of the budget."""
        return self.header_bytes + max(self.floor, self.used)

    def charge_headers(self, nbytes: int, path: str) -> None:
        """Add `nbytes` to the account's headers, or to other memory that it holds from beginning to end.

        A negative number takes bytes off. Headers never wait: two streams that each held some headers and waited for
        more could block each other.

        Raises
        ------
        BudgetError
            The headers of this account alone exceed the budget.
        """
        with self.budget._lock:
            self.header_bytes += nbytes
        if self.header_bytes > self.budget.nbytes:
            raise BudgetError(
                f"{path}: the checkpoint's headers, and a cache's buffers where there is one, need "
                f"{self.header_bytes:,} bytes, more than the memory budget of {self.budget.nbytes:,} bytes; "
                "raise memory_budget_mb",
                path=path,
                needed_bytes=self.header_bytes,
                budget_bytes=self.budget.nbytes,
            )

    async def set_floor(self, nbytes: int) -> None:
        """Wait until `nbytes` are set aside for this account."""
        await self._timed(nbytes, is_floor=True, is_urgent=True)

    async def allocate(self, nbytes: int, on_wait: Callable[[], object] | None = None) -> Lease:
        """Wait until `nbytes`, rounded up to pages, fit into the budget; return a lease of that memory.

        The memory goes back to the budget when the last view of the lease dies. `on_wait` is called once if the request
        has to wait.
        """
        charge = charge_of(nbytes)
        await self._timed(charge, is_floor=False, on_wait=on_wait)
        return self._take(nbytes, charge)

    async def allocate_alone(self, nbytes: int) -> Lease:
        """Wait until `nbytes` fit into the budget, and return a lease of that memory: the account's only buffer.

        The request waits like a request for a floor, so the headers of other accounts cannot keep it out.
        """
        charge = charge_of(nbytes)
        await self.set_floor(charge)
        lease = await self.allocate(nbytes)
        self.floor = 0  # the budget gets the memory back when the lease dies, before the account is closed
        return lease

    async def allocate_all(self, sizes: Sequence[int], on_wait: Callable[[], object]) -> list[Lease]:
        """Wait until buffers of all these sizes fit into the budget together; return their leases.

        If the request has to wait although everything reclaimable has been freed, `on_wait` is called once; it may
        raise.
        """
        charges = list(map(charge_of, sizes))
        await self._timed(sum(charges), is_floor=False, is_urgent=True, on_wait=on_wait)
        leases: list[Lease] = []
        try:
            for nbytes, charge in zip(sizes, charges, strict=True):
                leases.append(self._take(nbytes, charge))
        except BudgetError:
            with self.budget._lock:
                self.used -= sum(charges[len(leases) + 1 :])  # `_take` has taken off the charge that it failed with
            raise
        return leases

    async def _timed(
        self, nbytes: int, *, is_floor: bool, is_urgent: bool = False, on_wait: Callable[[], object] | None = None
    ) -> None:
        began = time.perf_counter()
        self.is_waiting = True
        try:
            await self.budget._reserve(self, nbytes, is_floor=is_floor, is_urgent=is_urgent, on_wait=on_wait)
        finally:
            self.is_waiting = False
            self.wait_s += time.perf_counter() - began

    def _take(self, nbytes: int, charge: int) -> Lease:
        budget = self.budget
        with budget._lock:
            try:
                extent = budget._arena.allocate(charge)
            except OSError as error:
                self.used -= charge
                raise BudgetError(
                    f"the system refused to reserve address space for a memory budget of {budget.memory_budget_mb} "
                    f"MiB ({error.strerror}); lower memory_budget_mb or raise the limit (ulimit -v)",
                    needed_bytes=charge,
                    budget_bytes=budget.nbytes,
                ) from error
            token = next(budget._tokens)
            lease = Lease(extent.region, extent.start, nbytes, budget._returns, token)
            self.buffers[token] = budget._buffers[token] = _Buffer(self, extent, charge)
            idle = budget._arena.take_idle(budget.nbytes + budget._held)
        budget._discard(idle)
        return lease

    def hand_over(self, *, newest_only: bool = False) -> bool:
        """Let buffers leave the budget, oldest first, until the account's waiting request is granted; return if it is.

        A stream calls it when none of its items is in flight or ready, so that all its buffers are the consumer's. With
        `newest_only` only the newest buffer is handed over, and none while another one is held.
        """
        budget = self.budget
        with budget._lock:
            budget._settle()
            budget._grant()
            buffers = [buffer for buffer in self.buffers.values() if not buffer.is_held]
            if newest_only:
                buffers = [] if self.held else buffers[-1:]
            for buffer in buffers:
                if not self.is_waiting:
                    break
                self._mark_held(buffer)
                budget._grant()
            return not self.is_waiting

    def bytes_alive(self) -> int:
        """Return the bytes of the account's buffers that are alive, whether they were handed over or not."""
        with self.budget._lock:
            self.budget._settle()
            return self.used + self.held

    def bytes_held(self) -> int:
        """Return the bytes of the account's buffers that have left the budget and are alive."""
        with self.budget._lock:
            self.budget._settle()
            return self.held

    def _mark_held(self, buffer: _Buffer) -> None:
        buffer.is_held = True
        self.used -= buffer.charge
        self.held += buffer.charge
        self.budget._held += buffer.charge

    def close(self) -> None:
        """Close the account. Buffers that are still alive leave the budget, and count as held."""
        with self.budget._lock:
            self.budget._settle()
            self.budget._close(self)
            self.budget._grant()

    async def aclose(self, threads: DaemonThreads | None = None) -> None:
        """Close the account, and give unused pages back to the system. A cancel does not interrupt it."""
        self.close()
        await trim_in_thread(self.budget, threads)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def charge_of(nbytes: int) -> int:
    """Return the bytes that a buffer of `nbytes` takes of the budget: whole pages, at least one."""
    return round_up(max(nbytes, 1))


async def trim_in_thread(budget: MemoryBudget, threads: DaemonThreads | None = None) -> None:
    """Give the unused pages of a budget back to the system in a thread, if no account is open.

    A cancel does not interrupt it: it finishes, and then raises. Without `threads` a new thread does the work; no
    thread is started if there is nothing to give back.
    """
    idle = budget._take_idle()
    if not idle:
        return
    worker = threads or DaemonThreads(1, "asyncshard-work")
    try:
        await worker.run_to_end(budget._discard, idle)
    finally:
        if worker is not threads:
            await worker.aclose()
