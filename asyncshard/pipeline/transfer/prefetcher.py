"""Reads ahead of the consumer: as many items as the pacing and the memory budget allow."""

from __future__ import annotations

import asyncio
from typing import Any

from asyncshard._core import Lease
from asyncshard.errors import BudgetError
from asyncshard.events import Listener, ReadEnded, ReadStarted
from asyncshard.pipeline.memory.budget import Account
from asyncshard.pipeline.transfer.slots import Slot, Slots
from asyncshard.pipeline.transfer.transfer import Transfer


class Prefetcher:
    """Fill the slots of one stream.

    Parameters
    ----------
    transfer : Transfer
    slots : Slots
    account : Account
        From which the items' buffers are reserved.
    is_strict : bool
        Whether delivered tensors that stay alive are an error once they block the next one.
    report : Listener
    own_tasks : set of asyncio.Task
        Gets the tasks that read, for as long as they run.
    """

    def __init__(
        self,
        transfer: Transfer,
        slots: Slots,
        account: Account,
        *,
        is_strict: bool,
        report: Listener,
        own_tasks: set[asyncio.Task[Any] | None],
    ) -> None:
        self._transfer = transfer
        self._slots = slots
        self._account = account
        self._is_strict = is_strict
        self._report = report
        self._own_tasks = own_tasks
        self._needed_bytes = 0
        """Bytes that the next item asks of the budget; 0 while it asks for nothing."""

    async def run(self) -> None:
        """Read the items that were begun and stopped, then the others, until all are read or one has failed."""
        async with asyncio.TaskGroup() as group:
            for slot in self._slots.unread():
                group.create_task(self._read(slot))
            await self._feed(group)

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        slots, transfer = self._slots, self._transfer
        while slots.has_items_left:
            if slots.is_far_enough(transfer.pacing.prefetch_count):
                await slots.until_freed()
                continue
            index = slots.next_item
            try:
                lease = await self._reserve(transfer.prepare(transfer.items[index]))
            except BudgetError as error:
                slots.fail(error)
                return
            if index != slots.next_item:  # earlier ones were given back meanwhile
                del lease
                continue
            group.create_task(self._read(slots.begin(lease)))
            del lease
        # With nothing in a checkpoint nobody else would tell the consumer.
        slots.slot_ready.set()

    async def _reserve(self, nbytes: int) -> Lease | None:
        if not nbytes:
            return None
        self._needed_bytes = nbytes
        try:
            return await self._account.allocate(nbytes, on_wait=self.unblock)
        finally:
            self._needed_bytes = 0

    def unblock(self) -> None:
        """Hand tensors over to the consumer where the next item can be read in no other way."""
        if not self._is_blocked():
            return
        self._account.budget.reclaim_for_waiters(is_urgent=True)
        if not self._account.hand_over(newest_only=self._is_strict):
            self._slots.fail(self._in_use_error())

    def _is_blocked(self) -> bool:
        """Return whether only tensors that leave the budget let the next item be read.

        The consumer waits, nothing of its stream is ready or in flight, and the budget cannot grant the next item.
        """
        is_waiting = self._account.is_waiting and bool(self._needed_bytes)
        return is_waiting and self._slots.is_consumer_waiting and not len(self._slots)

    def _in_use_error(self) -> BudgetError:
        budget = self._account.budget
        return BudgetError(
            f"tensors that were delivered and are still in use take {self._account.used:,} bytes; the next read "
            f"needs {self._needed_bytes:,} and the memory budget is {budget.nbytes:,} bytes: let go of them "
            "earlier, raise memory_budget_mb, or pass strict_budget=False",
            needed_bytes=self._needed_bytes,
            budget_bytes=budget.nbytes,
        )

    async def _read(self, slot: Slot) -> None:
        task = asyncio.current_task()
        self._own_tasks.add(task)
        transfer, item = self._transfer, slot.item
        assert item is not None
        path = transfer.checkpoint.shards[item.shard].path
        failure: Exception | None = None
        self._report(ReadStarted(path, item.start, item.stop))
        try:
            await transfer.read(item, slot.lease)
        except Exception as error:
            failure = error
        finally:
            self._report(ReadEnded(path, item.start, item.stop))
            self._own_tasks.discard(task)
            del task  # a cycle of task, exception and frame would keep the buffer alive
        if transfer.is_in_place:
            slot.lease = None
        self._slots.finish(slot, failure)
        del failure
        self._account.budget.reclaim_for_waiters()
