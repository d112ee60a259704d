"""The prefetcher reads items ahead of the consumer, as far as the prefetch count and the memory budget allow."""

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
    """Fills the slots of one stream.

    Parameters
    ----------
    transfer : Transfer
        The plan of the items, and how each is read.
    slots : Slots
        The queue to the consumer.
    account : Account
        The account from which the buffers are allocated.
    is_strict : bool
        Whether it is an error if delivered tensors that stay alive leave no memory for the next one.
    report : Listener
        Called with an event at the beginning and the end of each read.
    own_tasks : set of asyncio.Task
        A set that contains each task that reads, while it runs.
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
        """The bytes for which the next item waits; 0 while no item waits for the budget."""

    async def run(self) -> None:
        """Read all items, first those whose read was stopped. It ends when all are read, or when one has failed."""
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
            if index != slots.next_item:  # an earlier item was given back, and has to be read first
                del lease
                continue
            group.create_task(self._read(slots.begin(lease)))
            del lease
        # If there are no items, the consumer would wait for ever: no read tells it that it may go on.
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
        """If the next item cannot be read in any other way, hand over tensors to the consumer."""
        if not self._is_blocked():
            return
        self._account.budget.reclaim_for_waiters(is_urgent=True)
        if not self._account.hand_over(newest_only=self._is_strict):
            self._slots.fail(self._in_use_error())

    def _is_blocked(self) -> bool:
        """Return whether the next item can be read only if delivered tensors leave the budget.

        That is so if the consumer waits, no item of its stream is ready or in flight, and the next item does not fit
        into the budget.
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
            del task  # otherwise a cycle of task, exception and frame would keep the buffer alive
        if transfer.is_in_place:
            slot.lease = None
        self._slots.finish(slot, failure)
        del failure
        self._account.budget.reclaim_for_waiters()
