"""The memory that destinations cover, and where two of them meet."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Span
from asyncshard.plan.items import TensorKey

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
