"""Second copies: tensors whose destination another tensor fills, since a checkpoint may hold a shared weight twice.

The first copy in plan order is read into the destination. The second copy is read in blocks, through charged buffers,
and compared with the destination. If both copies have digests, the digests are compared instead, and the second copy is
not read.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from asyncshard.errors import DestinationError, FormatError
from asyncshard.format.digests import digests_of
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.plan.items import ReadItem, TensorKey


class FirstCopies:
    """The first copies, and whether each is complete in its destination."""

    def __init__(self) -> None:
        self._unread: Counter[TensorKey] = Counter()
        """For each first copy, the number of its items that have not been read."""
        self._keys: dict[ReadItem, list[TensorKey]] = {}
        """For each unread item that has first copies, these tensors."""
        self._advanced = asyncio.Condition()

    def expect(self, keys: set[TensorKey], items: Iterable[ReadItem]) -> None:
        """Set the tensors that are first copies, and the items of the plan. Slow: call it off the event loop."""
        for item in items if keys else ():
            firsts = [key for index in range(item.first, item.last) if (key := (item.shard, index)) in keys]
            if firsts:
                self._keys[item] = firsts
                self._unread.update(firsts)

    async def note(self, item: ReadItem) -> None:
        """Note that an item was read. An item counts once, even if it is read again."""
        keys = self._keys.pop(item, None)
        if keys is not None:
            async with self._advanced:
                self._unread.subtract(keys)
                self._advanced.notify_all()

    async def wait_for(self, key: TensorKey) -> None:
        """Wait until a first copy is complete. Its items come before those of the second, so their reads have begun."""
        async with self._advanced:
            await self._advanced.wait_for(lambda: self._unread[key] <= 0)


class CopyDigests:
    """Compares tensors of a checkpoint by their digests. This is slow for many tensors: use it off the event loop."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._digests: dict[int, NDArray[np.uint8] | None] = {}

    def are_equal(self, one: TensorKey, other: TensorKey) -> bool | None:
        """Return whether two tensors' digests are equal; None if one has no digest, or one that cannot be read."""
        digests = self._of(one), self._of(other)
        return None if digests[0] is None or digests[1] is None else digests[0] == digests[1]

    def _of(self, key: TensorKey) -> bytes | None:
        number, index = key
        if number not in self._digests:
            try:
                self._digests[number] = digests_of(self._checkpoint.shards[number].header)
            except FormatError:  # as if there were no digests: the bytes are compared
                self._digests[number] = None
        digests = self._digests[number]
        return None if digests is None else digests[index].tobytes()


def difference(first: str, second: str) -> str:
    """Return a sentence: two tensors that share one destination differ in the checkpoint."""
    return (
        f"{first!r} and {second!r} are one destination, and their tensors in the checkpoint differ: give each memory "
        "of its own, or remove one from the checkpoint"
    )


def copies_differ(path: str, first: str, second: str) -> DestinationError:
    """Return the error for a second copy that was read and differs from the first copy in its destination."""
    return DestinationError(f"{path}: {difference(first, second)}.", path=path, tensor=second)
