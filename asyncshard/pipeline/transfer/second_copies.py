"""Tensors whose destination another tensor of the checkpoint fills: a file may hold both copies of a shared weight.

The first copy in plan order is read into the destination. The second one is read in blocks, through charged buffers,
and compared with what is there; where both have digests, these are compared instead, and it is not read at all.
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
    """Which of the first copies are whole in their destinations."""

    def __init__(self) -> None:
        self._unread: Counter[TensorKey] = Counter()
        """Items that are still to be read of each."""
        self._keys: dict[ReadItem, list[TensorKey]] = {}
        self._advanced = asyncio.Condition()

    def expect(self, keys: set[TensorKey], items: Iterable[ReadItem]) -> None:
        """Look for the tensors in the items that are to be read. Slow for many: not for the event loop."""
        for item in items if keys else ():
            found = [key for index in range(item.first, item.last) if (key := (item.shard, index)) in keys]
            if found:
                self._keys[item] = found
                self._unread.update(found)

    async def note(self, item: ReadItem) -> None:
        """Count an item that was read; once more changes nothing."""
        keys = self._keys.pop(item, None)
        if keys is not None:
            async with self._advanced:
                self._unread.subtract(keys)
                self._advanced.notify_all()

    async def wait_for(self, key: TensorKey) -> None:
        """Wait until a tensor is whole. Its items come before those of the second copy, so that they have begun."""
        async with self._advanced:
            await self._advanced.wait_for(lambda: self._unread[key] <= 0)


class CopyDigests:
    """Compares two tensors of a checkpoint by their digests. Slow for many tensors: not for the event loop."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._digests: dict[int, NDArray[np.uint8] | None] = {}

    def are_equal(self, one: TensorKey, other: TensorKey) -> bool | None:
        """Return whether the digests are equal; None where one has none, or none that can be read."""
        digests = self._of(one), self._of(other)
        return None if digests[0] is None or digests[1] is None else digests[0] == digests[1]

    def _of(self, key: TensorKey) -> bytes | None:
        number, index = key
        if number not in self._digests:
            try:
                self._digests[number] = digests_of(self._checkpoint.shards[number].header)
            except FormatError:  # as if there were none: the bytes are compared
                self._digests[number] = None
        digests = self._digests[number]
        return None if digests is None else digests[index].tobytes()


def difference(first: str, second: str) -> str:
    """Return the sentence for two tensors that are one in the state dict and differ in the checkpoint."""
    return (
        f"{first!r} and {second!r} are one destination, and their tensors in the checkpoint differ: give each memory "
        "of its own, or remove one from the checkpoint"
    )


def copies_differ(path: str, first: str, second: str) -> DestinationError:
    """Return the error for a second copy that was read and is not what its destination holds."""
    return DestinationError(f"{path}: {difference(first, second)}.", path=path, tensor=second)
