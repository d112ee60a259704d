"""Destinations that share memory: finding them, and comparing two tensors of the files that have one destination.

A checkpoint may hold two copies of a weight that the model has once. The first copy in plan order is read into the
destination. The second copy is read in blocks, through charged buffers, and compared with the destination. If both
copies have digests, the digests are compared instead, and the second copy is not read. Any other memory that two
destinations share is an error.
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
"""NumPy tries 100,000 candidates to find out whether two strided views share memory; then we assume that they do."""


class Overlap(NamedTuple):
    """Two tensors whose destinations share memory."""

    first: TensorKey
    second: TensorKey
    is_exact: bool
    """Whether both destinations have the same elements, and both tensors the same dtype and shape. `first` is then the
    first of all such tensors in plan order."""


class CoveredMemory:
    """The memory that destinations cover.

    Destinations are added in plan order. `sort` orders them by address; an index counts them in that order.
    """

    def __init__(self) -> None:
        self._shard_list, self._index_list = array("q"), array("q")
        self._low_list, self._high_list, self._whole_list = array("Q"), array("Q"), array("b")
        self._strided: dict[int, NDArray[Any]] = {}
        """The views that are not contiguous, by their number in plan order."""

    def add(self, key: TensorKey, low: int, high: int, memory: NDArray[Any]) -> None:
        """Append the memory of the next destination, which must have elements."""
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
        """Sort the destinations by address. Call it once, after the last `add`."""
        lows, highs = np.array(self._low_list, np.uint64), np.array(self._high_list, np.uint64)
        whole = np.array(self._whole_list, np.bool_)
        self._order = np.lexsort((highs, lows))  # stable: destinations with the same bounds stay in plan order
        self._lows, self._highs = lows[self._order], highs[self._order]
        # For each index, the highest end of all destinations up to this index.
        self._reach = np.maximum.accumulate(self._highs)
        self._whole_reach = np.maximum.accumulate(np.where(whole[self._order], self._highs, 0))

    def has_inside(self, low: int, high: int) -> bool:
        """Return whether one contiguous destination covers the addresses [low, high)."""
        index = int(np.searchsorted(self._lows, np.uint64(low), side="right"))
        return index > 0 and int(self._whole_reach[index - 1]) >= high

    def overlaps(self, are_alike: Callable[[TensorKey, TensorKey], bool]) -> Iterator[Overlap]:
        """Yield for each destination that shares memory with another one before it, by address, both of them.

        `are_alike` says whether two tensors have the same dtype and shape.
        """
        suspects = np.flatnonzero(self._lows[1:] < self._reach[:-1]) + 1
        firsts: dict[int, int] = {}
        for index in suspects.tolist():
            if self._are_same(index, index - 1) and are_alike(self._key(index), self._key(index - 1)):
                first = firsts[index] = firsts.get(index - 1, index - 1)
                yield Overlap(self._key(first), self._key(index), is_exact=True)
                continue
            for other in range(index - 1, -1, -1):
                if self._reach[other] <= self._lows[index]:
                    break
                if self._highs[other] > self._lows[index] and self._share_memory(index, other):
                    yield Overlap(self._key(other), self._key(index), is_exact=False)
                    break

    def _key(self, index: int) -> TensorKey:
        number = int(self._order[index])
        return self._shard_list[number], self._index_list[number]

    def _are_same(self, index: int, other: int) -> bool:
        """Return whether two destinations, with elements of the same size, have the same elements in the same order."""
        if self._lows[index] != self._lows[other] or self._highs[index] != self._highs[other]:
            return False
        one, two = self._strided.get(int(self._order[index])), self._strided.get(int(self._order[other]))
        if one is None or two is None:
            return one is two
        return (one.shape, one.strides) == (two.shape, two.strides) and _address(one) == _address(two)

    def _share_memory(self, index: int, other: int) -> bool:
        """Return whether two destinations whose spans overlap share an element. Interleaved columns share none."""
        one, two = self._memory(index), self._memory(other)
        try:
            return np.shares_memory(one, two, max_work=_OVERLAP_WORK)
        except np.exceptions.TooHardError:
            return True

    def _memory(self, index: int) -> NDArray[Any]:
        low, high = int(self._lows[index]), int(self._highs[index])
        strided = self._strided.get(int(self._order[index]))
        return np.frombuffer(memoryview(Span(low, high - low, None)), np.uint8) if strided is None else strided


def _address(memory: NDArray[Any]) -> int:
    address: int = memory.__array_interface__["data"][0]
    return address


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
