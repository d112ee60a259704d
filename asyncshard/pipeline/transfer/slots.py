"""The queue between a stream's reads and its consumer, with all state that the two sides share."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from asyncshard._core import Lease
from asyncshard.plan.items import ReadItem

_BYTES_PER_ITEM = 8 << 20
"""Reading ahead stops at 8 MiB in buffers for each of `prefetch_count` items: more would only touch fresh memory."""


@dataclass(slots=True, eq=False)
class Slot:
    """A read item on its way from the store to the consumer."""

    item: ReadItem | None
    """The item; None if the slot has an error that belongs to no item."""
    lease: Lease | None = None
    """The item's buffer; None if it needs none, or if it has been copied to its destination."""
    is_done: bool = False
    """Whether the item was read, or its read has failed."""
    error: Exception | None = None
    """The error with which the read has failed."""


class Slots:
    """The slots whose read has begun and that the consumer has not taken, in plan order.

    Parameters
    ----------
    is_ordered : bool
        Whether the consumer takes slots in plan order, rather than in the order in which they are done.
    """

    def __init__(self, *, is_ordered: bool) -> None:
        self._is_ordered = is_ordered
        self._slots: deque[Slot] = deque()
        self._items: Sequence[ReadItem] = ()
        self._taken = 0
        """The number of items that the consumer has taken."""
        self.next_item = 0
        """The index of the item that is read next."""
        self.has_failed = False
        """Whether a read has failed, so that no further read begins."""
        self.handing_over: Slot | None = None
        """The slot that the consumer is about to take. It does not count as read ahead."""
        self.is_consumer_waiting = False
        """Whether the consumer waits for a slot."""
        self.demand = asyncio.Event()
        """Set while the consumer wants items."""
        self.slot_freed = asyncio.Event()
        """Set when the consumer takes a slot, or when a slot is given back."""
        self.slot_ready = asyncio.Event()
        """Set when a slot is done, or when no slot will come any more."""

    def __len__(self) -> int:
        return len(self._slots)

    def plan(self, items: Sequence[ReadItem]) -> None:
        """Set the items that are to be read, in order."""
        self._items = items

    @property
    def is_exhausted(self) -> bool:
        """Whether the consumer has taken all items."""
        return self._taken == len(self._items)

    @property
    def is_fed(self) -> bool:
        """Whether the read of every item has ended."""
        return self.next_item == len(self._items) and all(slot.is_done for slot in self._slots)

    @property
    def has_items_left(self) -> bool:
        """Whether a further read may begin."""
        return self.next_item < len(self._items) and not self.has_failed

    def is_far_enough(self, prefetch_count: int) -> bool:
        """Return whether enough is read ahead: `prefetch_count` items, or buffers of 8 MiB times `prefetch_count`."""
        ahead = [slot for slot in self._slots if slot is not self.handing_over]
        buffered = sum(slot.lease.nbytes for slot in ahead if slot.lease is not None)
        return len(ahead) >= prefetch_count or buffered >= prefetch_count * _BYTES_PER_ITEM

    def begin(self, lease: Lease | None) -> Slot:
        """Append a slot for the next item, whose read begins now; return it."""
        slot = Slot(self._items[self.next_item], lease)
        self._slots.append(slot)
        self.next_item += 1
        return slot

    def unread(self) -> Iterator[Slot]:
        """Yield the slots that are not done: while no read runs, those whose read was stopped."""
        return (slot for slot in self._slots if not slot.is_done)

    def find_done(self) -> Slot | None:
        """Return the slot that the consumer may take now; None if it has to wait."""
        for slot in self._slots:
            if slot.is_done:
                return slot
            if self._is_ordered:
                break
        return None

    def take(self, slot: Slot) -> bool:
        """Remove a slot, for the consumer; return False if the slot is no longer in the queue."""
        if slot not in self._slots:
            return False
        self._slots.remove(slot)
        self._taken += slot.item is not None
        self.slot_freed.set()
        return True

    def give_back(self) -> bool:
        """Drop the newest slot, so that its item is read again later; return False if that would free no memory."""
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
        """Mark a slot as done: as read, or with an error as failed."""
        if error is not None:
            self.has_failed = True
            slot.error = error
            slot.lease = None
        slot.is_done = True
        self.slot_ready.set()

    def fail(self, error: Exception) -> None:
        """Append a slot with an error that belongs to no item."""
        self.has_failed = True
        self._slots.append(Slot(None, is_done=True, error=error))
        self.slot_ready.set()

    async def until_freed(self) -> None:
        """Wait until the consumer takes a slot, or a slot is given back."""
        self.slot_freed.clear()
        await self.slot_freed.wait()

    def clear(self) -> None:
        """Drop all slots and their memory."""
        self._slots.clear()
