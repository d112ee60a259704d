"""The supervisor: the one task of a stream, which opens the checkpoint, reads ahead within the budget, and cleans up.

A task group must be entered and left by one task, and the consumer's task may change. So the task group belongs to the
supervisor's task, and the stream only talks to this task: any task may close the stream, in any order.

    open ─► reserve ─► read ─► slots, in plan order ─► next_slot ─► consumer
              ▲ budget          ▲ at most `prefetch_count`
"""

from __future__ import annotations

import asyncio
import contextlib
from enum import Enum
from typing import Any

from asyncshard.errors import StreamClosedError
from asyncshard.events import Closed, Listener, Opened
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.memory.budget import Account, Reclaimable, charge_of
from asyncshard.pipeline.transfer.load import Delivery, Load, open_transfer
from asyncshard.pipeline.transfer.prefetcher import Prefetcher
from asyncshard.pipeline.transfer.slots import Slot, Slots
from asyncshard.pipeline.transfer.statistics import Counters
from asyncshard.pipeline.transfer.transfer import Transfer
from asyncshard.tasks.threads import wait_to_end

_TURNS_TO_READ = 3
"""A read begins 3 turns of the event loop after a slot is freed: the feeder's turn, the item's, and its chunks'."""


class State(Enum):
    """The states of a stream."""

    OPENING = "opening"
    """The checkpoint is being opened, and the transfer planned."""
    OPEN = "open"
    """The transfer is planned, and the consumer has not asked for a tensor yet."""
    READING = "reading"
    """The consumer has asked for tensors."""
    CLOSING = "closing"
    """The reads are being stopped."""
    ENDED = "ended"
    """All tensors were delivered, and everything is closed."""
    CLOSED = "closed"
    """The stream was closed before its end."""
    FAILED = "failed"
    """An error has ended the stream."""


class Supervisor:
    """Runs one stream. A supervisor is made, and its task started, within a running event loop.

    Parameters
    ----------
    load : Load
    delivery : Delivery

    Raises
    ------
    ValueError, TypeError, ImportError
        There is no store for such a path.
    """

    def __init__(self, load: Load, delivery: Delivery) -> None:
        opening = load.open()
        self.account: Account = opening.account
        load.budget.add_reclaimer(self)
        self.counters = Counters()
        self.report: Listener = self.counters.take
        """Called with each event of this stream, from any thread."""
        self.transfer: Transfer | None = None
        self._slots = Slots(is_ordered=load.is_ordered)
        self._crash: BaseException | None = None
        self._prefetcher: Prefetcher | None = None
        self._is_halting = False
        self._is_closing = False
        self._own_tasks: set[asyncio.Task[Any] | None] = set()
        self.loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self.loop.create_future()
        self._work = self.loop.create_task(self._serve(load, delivery, opening), name="asyncshard-serve")
        self._reader: asyncio.Task[None] | None = None
        self._task = self.loop.create_task(self._run(opening), name="asyncshard-stream")

    @property
    def state(self) -> State:
        """The state of the stream."""
        if not self._task.done():
            if self._is_closing:
                return State.CLOSING
            if self.transfer is None:
                return State.OPENING
            return State.READING if self._slots.demand.is_set() else State.OPEN
        if self._crash is not None or self._slots.has_failed:
            return State.FAILED
        return State.ENDED if self.transfer is not None and self._slots.is_exhausted else State.CLOSED

    def __repr__(self) -> str:
        return f"<Supervisor {self.state.value}, {len(self._slots)} items ahead, {self.account!r}>"

    # For the consumer

    async def opened(self) -> None:
        """Wait until the checkpoint is open and the transfer planned; raise the error if that has failed."""
        if not self._opened.done():
            await asyncio.wait([self._opened])
        self._opened.result()

    async def next_slot(self) -> Slot | None:
        """Return the slot of the next item that is done; None after the last. A cancel loses no item."""
        slots = self._slots
        slots.demand.set()
        while True:
            slot = slots.find_done()
            if slot is not None:
                if slot.lease is not None:
                    await self._let_reads_begin(slot)
                if slots.take(slot):
                    return slot
            is_exhausted = self.transfer is not None and slots.is_exhausted
            if self._task.done():
                if self._crash is not None:
                    raise self._crash
                if not is_exhausted:
                    raise StreamClosedError("the stream was closed before its end")
            if is_exhausted:
                return None
            slots.slot_ready.clear()
            slots.is_consumer_waiting = True
            try:
                if self._prefetcher is not None:
                    self._prefetcher.unblock()
                await slots.slot_ready.wait()
            finally:
                slots.is_consumer_waiting = False

    async def _let_reads_begin(self, slot: Slot) -> None:
        """Let the next reads begin, for which this slot makes room, before the consumer blocks the event loop."""
        self._slots.handing_over = slot
        self._slots.slot_freed.set()
        try:
            for _ in range(_TURNS_TO_READ):
                await asyncio.sleep(0)
        finally:
            self._slots.handing_over = None

    async def halt(self) -> None:
        """Stop the reads in flight, and wait until none of them writes. The next `next_slot` starts them again."""
        reader = self._reader
        if reader is not None and not reader.done():
            self._is_halting = True
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await wait_to_end(reader)

    async def aclose(self) -> None:
        """Stop everything, and wait for its end, even if this call is cancelled.

        Any task may call it, any number of times.
        """
        self._cancel()
        if asyncio.current_task() not in self._own_tasks:  # a sink may close the stream that feeds it
            await self.join()

    async def join(self) -> None:
        """Wait until this task has cleaned up and ended."""
        await wait_to_end(self._task)

    def abandon(self) -> None:
        """Stop everything, without waiting. Any thread may call it, even after the event loop has closed."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if not self._is_closing:  # a second cancel would interrupt the closing
            self._is_closing = True
            self._work.cancel()

    # For the budget

    def reclaim(self, kind: Reclaimable) -> bool:
        """Give back an item that was read ahead; it is read again later.

        This is done only while the consumer is busy elsewhere. It may be the consumer that waits for the budget, for
        example if it asks a cache for a shard between two tensors.
        """
        if kind is not Reclaimable.READ_AHEAD:
            return False
        try:
            is_here = asyncio.get_running_loop() is self.loop
        except RuntimeError:
            is_here = False
        if is_here:
            return self._give_back()
        with contextlib.suppress(RuntimeError):  # the event loop of the stream has closed
            self.loop.call_soon_threadsafe(self._give_back)
        return False

    def _give_back(self) -> bool:
        return not self._slots.is_consumer_waiting and self._slots.give_back()

    # The task

    async def _run(self, opening: Opening) -> None:
        """Wait for the end of the work, even if this task is cancelled, and note how it ended."""
        self._own_tasks |= {asyncio.current_task(), self._work}
        try:
            try:
                await wait_to_end(self._work, self._cancel)
            finally:
                await opening.aclose()  # open still if the work was cancelled before its first step
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # a mapping or a sink of the caller may raise any, and the consumer would hang
            self._crash = error
        self.report(Closed())
        if not self._opened.done():
            self._opened.set_exception(self._crash or StreamClosedError("the stream was closed before it was open"))
            self._opened.exception()  # so that asyncio does not warn if nobody waits for it
        self._slots.slot_ready.set()  # last of all: `next_slot` has to find this task done when it wakes up

    async def _serve(self, load: Load, delivery: Delivery, opening: Opening) -> None:
        async with open_transfer(load, opening, delivery, self.report) as transfer:
            try:
                prefetcher = self._begin(transfer, is_strict=load.is_strict)
                await self._slots.demand.wait()
                largest = max(map(transfer.buffer_bytes, transfer.items), default=0)
                if largest:
                    await self.account.set_floor(charge_of(largest))
                await self._read_to_end(prefetcher)
            finally:
                self._slots.clear()  # before the account is closed: slots that nobody has taken must not count as held

    def _begin(self, transfer: Transfer, *, is_strict: bool) -> Prefetcher:
        self.transfer = transfer
        self.report(Opened(transfer.tensors_total, transfer.bytes_total, transfer.missing, transfer.unexpected))
        self._slots.plan(transfer.items)
        self._prefetcher = Prefetcher(
            transfer,
            self._slots,
            self.account,
            is_strict=is_strict,
            report=self.report,
            own_tasks=self._own_tasks,
        )
        self._opened.set_result(None)
        return self._prefetcher

    async def _read_to_end(self, prefetcher: Prefetcher) -> None:
        """Read until every item has been taken. An item that was read may be given back, and is then read again."""
        slots = self._slots
        while True:
            if not (slots.is_fed or slots.has_failed):
                await self._read_round(prefetcher)
            elif len(slots):
                await slots.until_freed()
            else:
                return

    async def _read_round(self, prefetcher: Prefetcher) -> None:
        """Read until all items are read. If `halt` stops the reads, wait until the consumer asks for an item."""
        self._is_halting = False
        self._reader = self.loop.create_task(prefetcher.run(), name="asyncshard-reader")
        self._own_tasks.add(self._reader)
        try:
            await wait_to_end(self._reader, self._reader.cancel)
        except asyncio.CancelledError:
            if self._is_closing or not self._is_halting:
                raise
            self._slots.demand.clear()
            await self._slots.demand.wait()
