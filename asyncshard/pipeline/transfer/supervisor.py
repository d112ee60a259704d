"""The pipeline's one task: it opens the checkpoint, reads ahead within the budget, and cleans up.

A task group cannot live across the user's frames, so it lives here, and the stream object only talks to this task: it
may be closed from any task, in any order.

    open ─► reserve ─► read ─► slots, in plan order ─► next_slot ─► consumer
              ▲ budget          ▲ at most `prefetch_count`
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from asyncshard._core import Lease
from asyncshard.errors import BudgetError, StreamClosedError
from asyncshard.pipeline.memory.budget import Account, MemoryBudget, Reclaimable, charge_of
from asyncshard.pipeline.transfer.statistics import Counters
from asyncshard.pipeline.transfer.transfer import Transfer
from asyncshard.plan.items import ReadItem
from asyncshard.tasks.threads import DaemonThreads, wait_to_end

_BYTES_PER_ITEM = 8 << 20
"""Reading further ahead in buffers only touches more memory, and touching memory for the first time is slow."""
_TURNS_TO_READ = 3
"""Turns of the loop from room for an item to its reads: the feeder's, the item's task's, its chunks'."""

Opener = Callable[[Account, DaemonThreads], AbstractAsyncContextManager[Transfer]]
"""Opens a checkpoint and plans the transfer; its store stays open until the context ends."""


@dataclass(slots=True, eq=False)
class Slot:
    """A read item on its way from the store to the consumer."""

    item: ReadItem | None
    lease: Lease | None = None
    is_done: bool = False
    error: Exception | None = None


class Supervisor:
    """Run one stream.

    Parameters
    ----------
    opener : Opener
    budget : MemoryBudget
    is_strict : bool
        Whether delivered tensors that stay alive are an error once they block the next one.
    is_ordered : bool
        Whether items are delivered in plan order, rather than as they complete.
    """

    def __init__(
        self,
        opener: Opener,
        budget: MemoryBudget,
        *,
        is_strict: bool,
        is_ordered: bool,
    ) -> None:
        self._opener = opener
        self._budget = budget
        self._is_strict = is_strict
        self._is_ordered = is_ordered
        self.account = budget.open_account()
        budget.add_reclaimer(self)
        self.counters = Counters()
        self.transfer: Transfer | None = None
        self._slots: deque[Slot] = deque()
        self._leaving: Slot | None = None
        """What the consumer is about to take: no longer ahead of it."""
        self._next_item = 0
        self._has_failed = False
        self._crash: Exception | None = None
        self._needed_bytes = 0
        """What the feeder asks of the budget."""
        self._is_consumer_waiting = False
        self._is_halting = False
        self._asked = asyncio.Event()
        """The consumer wants items."""
        self._taken = asyncio.Event()
        """The consumer took a slot."""
        self._changed = asyncio.Event()
        """A slot is done, or there will be no more."""
        self._is_closing = False
        self._threads = DaemonThreads(1, "asyncshard-work")
        self._own_tasks: set[asyncio.Task[Any] | None] = set()
        self.loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self.loop.create_future()
        self._work = self.loop.create_task(self._serve(), name="asyncshard-serve")
        self._reader: asyncio.Task[None] | None = None
        self._task = self.loop.create_task(self._run(), name="asyncshard-stream")

    # For the consumer

    async def opened(self) -> None:
        """Wait until the checkpoint is open and the transfer planned; raise what prevented it."""
        if not self._opened.done():
            await asyncio.wait([self._opened])
        self._opened.result()

    async def next_slot(self) -> Slot | None:
        """Return the next item that was read, or failed; None after the last. Cancelling it loses nothing."""
        self._asked.set()
        while True:
            slot = self._find_done()
            if slot is not None:
                if slot.lease is not None:
                    await self._let_reads_begin(slot)
                if slot in self._slots:  # not closed meanwhile
                    self._slots.remove(slot)
                    self._taken.set()
                    return slot
            if self._task.done():
                if self._crash is not None:
                    raise self._crash
                if not self._is_complete():
                    raise StreamClosedError("the stream was closed before its end")
                return None
            if self._is_complete():
                return None
            self._changed.clear()
            self._is_consumer_waiting = True
            try:
                self._relieve()
                await self._changed.wait()
            finally:
                self._is_consumer_waiting = False

    async def halt(self) -> None:
        """Stop the reads in flight and wait until none writes; the next `next_slot` starts them again."""
        reader = self._reader
        if reader is not None and not reader.done():
            self._is_halting = True
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await wait_to_end(reader)

    async def aclose(self) -> None:
        """Stop everything and wait for its end, even when cancelled meanwhile. From any task, any number of times."""
        self._cancel()
        if asyncio.current_task() not in self._own_tasks:  # a sink may close the stream that feeds it
            await self.join()

    async def join(self) -> None:
        """Wait until this task has cleaned up and ended."""
        await wait_to_end(self._task)

    def abandon(self) -> None:
        """Stop everything, without waiting; from any thread, also after the loop has closed."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._cancel)

    # For the budget

    def reclaim(self, what: Reclaimable) -> bool:
        """Give back an item that was read ahead; it is read again later.

        Only while the consumer is busy elsewhere: it may be the very one that waits, as when it asks a cache for a
        shard from within its loop.
        """
        if what is not Reclaimable.READ_AHEAD:
            return False
        try:
            is_here = asyncio.get_running_loop() is self.loop
        except RuntimeError:
            is_here = False
        if is_here:
            return self._give_back()
        with contextlib.suppress(RuntimeError):  # its loop has closed
            self.loop.call_soon_threadsafe(self._give_back)
        return False

    def _give_back(self) -> bool:
        if self.transfer is None or self._is_consumer_waiting or not self._slots:
            return False
        slot = self._slots[-1]
        is_newest = self._next_item > 0 and slot.item is self.transfer.items[self._next_item - 1]
        if not is_newest or not slot.is_done or slot.lease is None or slot is self._leaving:
            return False
        self._slots.pop()
        slot.lease = None
        self._next_item -= 1
        self._taken.set()
        return True

    def _cancel(self) -> None:
        if not self._is_closing:  # once: a second cancel would interrupt the closing
            self._is_closing = True
            self._work.cancel()

    def _find_done(self) -> Slot | None:
        for slot in self._slots:
            if slot.is_done:
                return slot
            if self._is_ordered:
                break
        return None

    async def _let_reads_begin(self, slot: Slot) -> None:
        """Let the reads begin that taking a slot makes room for, before the consumer occupies the loop with it."""
        self._leaving = slot
        self._taken.set()
        try:
            for _ in range(_TURNS_TO_READ):
                await asyncio.sleep(0)
        finally:
            self._leaving = None

    def _is_complete(self) -> bool:
        return self.transfer is not None and not self._slots and self._next_item == len(self.transfer.items)

    # The task

    async def _run(self) -> None:
        """See the work to its end, whoever cancels what, and clean up."""
        self._own_tasks |= {asyncio.current_task(), self._work}
        try:
            await wait_to_end(self._work, self._cancel)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            self._crash = error
        closing = asyncio.ensure_future(self._clean_up())
        with contextlib.suppress(asyncio.CancelledError):
            await wait_to_end(closing)
        self._changed.set()  # as the last thing: who waits in `next_slot` has to find this task done

    async def _serve(self) -> None:
        async with self._opener(self.account, self._threads) as transfer:
            self.transfer = transfer
            self.counters.bytes_total = transfer.bytes_total
            self.counters.tensors_total = transfer.tensors_total
            self._opened.set_result(None)
            await self._asked.wait()
            largest = max(map(transfer.buffer_bytes, transfer.items), default=0)
            if largest:
                await self.account.set_floor(charge_of(largest))
            # Until all is read and taken: what was read may be given back, and has to be read again then.
            while self._slots or not (self._is_fed(transfer) or self._has_failed):
                if self._is_fed(transfer) or self._has_failed:
                    await self._until_taken()
                else:
                    await self._read_round(transfer)

    async def _clean_up(self) -> None:
        self._slots.clear()
        self.account.close()
        await self._threads.run(self._budget.trim)
        await self._threads.aclose()
        self.counters.ended = time.perf_counter()
        if not self._opened.done():
            self._opened.set_exception(self._crash or StreamClosedError("the stream was closed before it was open"))
            self._opened.exception()  # seen, should nobody wait for it

    async def _read_round(self, transfer: Transfer) -> None:
        """Read until all items are read, or until halted; then wait until the consumer asks again."""
        self._is_halting = False
        self._reader = self.loop.create_task(self._read_all(transfer), name="asyncshard-reader")
        self._own_tasks.add(self._reader)
        try:
            await wait_to_end(self._reader, self._reader.cancel)
        except asyncio.CancelledError:
            if self._is_closing or not self._is_halting:
                raise
            self._asked.clear()
            await self._asked.wait()

    async def _read_all(self, transfer: Transfer) -> None:
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                if not slot.is_done:  # a halt stopped it
                    group.create_task(self._read(transfer, slot))
            await self._feed(transfer, group)

    def _is_fed(self, transfer: Transfer) -> bool:
        return self._next_item == len(transfer.items) and all(slot.is_done for slot in self._slots)

    async def _feed(self, transfer: Transfer, group: asyncio.TaskGroup) -> None:
        while self._next_item < len(transfer.items) and not self._has_failed:
            if self._is_far_enough(transfer.pacing.prefetch_count):
                await self._until_taken()
                continue
            number = self._next_item
            item = transfer.items[number]
            try:
                lease = await self._reserve(transfer.prepare(item))
            except BudgetError as error:
                self._fail(error)
                return
            if number != self._next_item:  # earlier ones were given back meanwhile
                del lease
                continue
            slot = Slot(item, lease)
            del lease
            self._slots.append(slot)
            self._next_item += 1
            group.create_task(self._read(transfer, slot))
            del slot
        # With nothing in a checkpoint nobody else would tell the consumer.
        self._changed.set()

    def _is_far_enough(self, prefetch_count: int) -> bool:
        """Whether enough is ahead of the consumer: items, and, of those in buffers, 8 MiB for each of these."""
        ahead = [slot for slot in self._slots if slot is not self._leaving]
        buffered = sum(slot.lease.nbytes for slot in ahead if slot.lease is not None)
        return len(ahead) >= prefetch_count or buffered >= prefetch_count * _BYTES_PER_ITEM

    async def _until_taken(self) -> None:
        self._taken.clear()
        await self._taken.wait()

    async def _reserve(self, nbytes: int) -> Lease | None:
        if not nbytes:
            return None
        self._needed_bytes = nbytes
        try:
            return await self.account.allocate(nbytes, on_wait=self._relieve)
        finally:
            self._needed_bytes = 0

    def _relieve(self) -> None:
        """Hand tensors over where the next item can be read in no other way.

        That is so while the consumer waits, nothing of its stream is ready or in flight, and the budget cannot grant
        the next item.
        """
        if not self.account.is_waiting or not self._needed_bytes or not self._is_consumer_waiting or self._slots:
            return
        self._budget.reclaim_for_waiters(is_urgent=True)
        if not self.account.hand_over(newest_only=self._is_strict):
            budget = self._budget
            self._fail(
                BudgetError(
                    f"tensors that were delivered and are still in use take {self.account.used:,} bytes; the next read "
                    f"needs {self._needed_bytes:,} and the memory budget is {budget.nbytes:,} bytes: let go of them "
                    "earlier, raise memory_budget_mb, or pass strict_budget=False",
                    needed_bytes=self._needed_bytes,
                    budget_bytes=budget.nbytes,
                )
            )

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        self._slots.append(Slot(None, is_done=True, error=error))
        self._changed.set()

    async def _read(self, transfer: Transfer, slot: Slot) -> None:
        task = asyncio.current_task()
        self._own_tasks.add(task)
        item = slot.item
        assert item is not None
        self.counters.bytes_in_flight += item.nbytes
        try:
            await transfer.read(item, slot.lease)
        except Exception as error:
            self._has_failed = True
            slot.error = error
            slot.lease = None
        finally:
            self.counters.bytes_in_flight -= item.nbytes
            self._own_tasks.discard(task)
            del task  # a cycle of task, exception and frame would keep the buffer alive
        if transfer.is_in_place:
            slot.lease = None
        slot.is_done = True
        self._changed.set()
        self._budget.reclaim_for_waiters()
