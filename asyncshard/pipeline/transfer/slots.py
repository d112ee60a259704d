"""The queue between a stream's reads and its consumer: all that the two ends share."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from asyncshard._core import Lease
from asyncshard.plan.items import ReadItem

_BYTES_PER_ITEM = 8 << 20
"""Bytes in buffers for each of `prefetch_count` items, 8 MiB: reading further ahead only touches more fresh memory."""


@dataclass(slots=True, eq=False)
class Slot:
    """A read item on its way from the store to the consumer."""

    item: ReadItem | None
    """None for an error that belongs to no item."""
    lease: Lease | None = None
    """The buffer; None for an item that needs none, or that is in its place."""
    is_done: bool = False
    """Whether it was read, or failed."""
    error: Exception | None = None


class Slots:
    """Slots in plan order, from the first that the consumer has not taken to the last whose read has begun.

    Parameters
    ----------
    is_ordered : bool
        Whether the consumer takes them in plan order, rather than as they are done.
    """

    def __init__(self, *, is_ordered: bool) -> None:
        self._is_ordered = is_ordered
        self._slots: deque[Slot] = deque()
        self._items: Sequence[ReadItem] = ()
        self.next_item = 0
        """The index of the item that is read next."""
        self.has_failed = False
        """Whether a read has failed: no further one is begun."""
        self.handing_over: Slot | None = None
        """The slot that the consumer is about to take: it does not count as ahead of the consumer."""
        self.is_consumer_waiting = False
        self.demand = asyncio.Event()
        """Set while the consumer wants items."""
        self.slot_freed = asyncio.Event()
        """Set when the consumer took a slot."""
        self.slot_ready = asyncio.Event()
        """Set when a slot is done, or when there will be no more."""

    def __len__(self) -> int:
        return len(self._slots)

    def plan(self, items: Sequence[ReadItem]) -> None:
        """Set the items that are to be read, in order."""
        self._items = items

    @property
    def is_exhausted(self) -> bool:
        """Whether the consumer has taken the last item."""
        return not self._slots and self.next_item == len(self._items)

    @property
    def is_fed(self) -> bool:
        """Whether nothing is left to be read: every item was begun and is done."""
        return self.next_item == len(self._items) and all(slot.is_done for slot in self._slots)

    @property
    def has_items_left(self) -> bool:
        """Whether a further read may be begun."""
        return self.next_item < len(self._items) and not self.has_failed

    def is_far_enough(self, prefetch_count: int) -> bool:
        """Return whether enough is ahead of the consumer: `prefetch_count` items, or 8 MiB in buffers for each."""
        ahead = [slot for slot in self._slots if slot is not self.handing_over]
        buffered = sum(slot.lease.nbytes for slot in ahead if slot.lease is not None)
        return len(ahead) >= prefetch_count or buffered >= prefetch_count * _BYTES_PER_ITEM

    def begin(self, lease: Lease | None) -> Slot:
        """Append the slot of the next item, whose read begins now."""
        slot = Slot(self._items[self.next_item], lease)
        self._slots.append(slot)
        self.next_item += 1
        return slot

    def unread(self) -> Iterator[Slot]:
        """Yield the slots whose read was stopped and has to begin again."""
        return (slot for slot in self._slots if not slot.is_done)

    def find_done(self) -> Slot | None:
        """Return the slot that the consumer takes next; None while it has to wait."""
        for slot in self._slots:
            if slot.is_done:
                return slot
            if self._is_ordered:
                break
        return None

    def take(self, slot: Slot) -> bool:
        """Take a slot out; False where the stream was closed meanwhile."""
        if slot not in self._slots:
            return False
        self._slots.remove(slot)
        self.slot_freed.set()
        return True

    def give_back(self) -> bool:
        """Drop the newest slot, so that its item is read again later; False where that gives back no memory."""
        slot = self._slots[-1] if self._slots else None
        if slot is None or self.next_item == 0 or slot.item is not self._items[self.next_item - 1]:
            return False
        if not slot.is_done or slot.lease is None or slot is self.handing_over:
            return False
        self._slots.pop()
        slot.lease = None
        self.next_item -= 1
        self.slot_freed.set()
        return True

    def finish(self, slot: Slot, error: Exception | None) -> None:
        """Mark a slot as read, or as failed."""
        if error is not None:
            self.has_failed = True
            slot.error = error
            slot.lease = None
        slot.is_done = True
        self.slot_ready.set()

    def fail(self, error: Exception) -> None:
        """Append an error that belongs to no item."""
        self.has_failed = True
        self._slots.append(Slot(None, is_done=True, error=error))
        self.slot_ready.set()

    async def until_freed(self) -> None:
        """Wait until the consumer takes a slot."""
        self.slot_freed.clear()
        await self.slot_freed.wait()

    def clear(self) -> None:
        """Let go of all slots and their memory."""
        self._slots.clear()
