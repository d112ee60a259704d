"""Destinations that share memory: where two of them meet, and second copies of a tensor that has one destination.

A file may hold both copies of a weight that is one in the model. The first copy in plan order is read into the
destination. The second one is read in blocks, through charged buffers, and compared with what is there; where both have
digests, these are compared instead, and it is not read at all. Any other memory that two destinations share is a fault.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Span
from asyncshard.errors import DestinationError, FormatError
from asyncshard.format.digests import digests_of
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.plan.items import ReadItem, TensorKey

_OVERLAP_WORK: Any = 100_000  # any number, for stubs of NumPy before 2.5
"""How hard NumPy tries to tell whether two strided views share memory, before we assume that they do."""


class Overlap(NamedTuple):
    """Two tensors whose destinations share memory."""

    first: TensorKey
    second: TensorKey
    is_exact: bool
    """Whether they are the same elements, of alike tensors; `first` is then the first of all such in plan order."""


class CoveredMemory:
    """The memory that destinations cover, by address."""

    def __init__(self) -> None:
        self._shard_list, self._index_list = array("q"), array("q")
        self._low_list, self._high_list, self._whole_list = array("Q"), array("Q"), array("b")
        self._strided: dict[int, NDArray[Any]] = {}
        """Views that do not fill what they span, by place."""

    def add(self, key: TensorKey, low: int, high: int, memory: NDArray[Any]) -> None:
        """Append the memory of the next destination, which has elements."""
        is_whole = memory.flags.c_contiguous
        if not is_whole:
            self._strided[len(self._low_list)] = memory
        shard, index = key
        self._shard_list.append(shard)
        self._index_list.append(index)
        self._low_list.append(low)
        self._high_list.append(high)
        self._whole_list.append(is_whole)

    def sort(self) -> None:
        """Order by address; to be called once, after the last `add`."""
        lows, highs = np.array(self._low_list, np.uint64), np.array(self._high_list, np.uint64)
        whole = np.array(self._whole_list, np.bool_)
        self._order = np.lexsort((highs, lows))  # stable: of the same bounds, in plan order
        self._lows, self._highs = lows[self._order], highs[self._order]
        # How far those before and at each place reach, at most.
        self._reach = np.maximum.accumulate(self._highs)
        self._whole_reach = np.maximum.accumulate(np.where(whole[self._order], self._highs, 0))

    def has_inside(self, low: int, high: int) -> bool:
        """Return whether one contiguous destination covers [low, high)."""
        place = int(np.searchsorted(self._lows, np.uint64(low), side="right"))
        return place > 0 and int(self._whole_reach[place - 1]) >= high

    def overlaps(self, are_alike: Callable[[TensorKey, TensorKey], bool]) -> Iterator[Overlap]:
        """Yield each destination that shares memory with one before it by address, and that one."""
        suspects = np.flatnonzero(self._lows[1:] < self._reach[:-1]) + 1
        firsts: dict[int, int] = {}
        for place in suspects.tolist():
            if self._are_same(place, place - 1) and are_alike(self._key(place), self._key(place - 1)):
                first = firsts[place] = firsts.get(place - 1, place - 1)
                yield Overlap(self._key(first), self._key(place), is_exact=True)
                continue
            for other in range(place - 1, -1, -1):
                if self._reach[other] <= self._lows[place]:
                    break
                if self._highs[other] > self._lows[place] and self._share_memory(place, other):
                    yield Overlap(self._key(other), self._key(place), is_exact=False)
                    break

    def _key(self, place: int) -> TensorKey:
        number = int(self._order[place])
        return self._shard_list[number], self._index_list[number]

    def _are_same(self, place: int, other: int) -> bool:
        """Return whether two have the same elements in the same order, if these are of the same size."""
        if self._lows[place] != self._lows[other] or self._highs[place] != self._highs[other]:
            return False
        one, two = self._strided.get(int(self._order[place])), self._strided.get(int(self._order[other]))
        if one is None or two is None:
            return one is two
        return (one.shape, one.strides) == (two.shape, two.strides) and _address(one) == _address(two)

    def _share_memory(self, place: int, other: int) -> bool:
        """Whether two whose spans overlap really meet; not so for views of interleaved columns."""
        one, two = self._memory(place), self._memory(other)
        try:
            return np.shares_memory(one, two, max_work=_OVERLAP_WORK)
        except np.exceptions.TooHardError:
            return True

    def _memory(self, place: int) -> NDArray[Any]:
        low, high = int(self._lows[place]), int(self._highs[place])
        strided = self._strided.get(int(self._order[place]))
        return np.frombuffer(memoryview(Span(low, high - low, None)), np.uint8) if strided is None else strided


def _address(memory: NDArray[Any]) -> int:
    address: int = memory.__array_interface__["data"][0]
    return address


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
