"""The tensors of one shard in memory, as a mapping that makes an array when its name is looked up."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from asyncshard._core import Lease
from asyncshard.pipeline.transfer.buffered import BufferedTransfer
from asyncshard.plan.items import ReadItem


class ShardTensors(Mapping[str, Any]):
    """A read-only mapping of name to tensor: the tensors in the order of their bytes, and after them tied names.

    Each look-up returns a new view of the same memory. NumPy arrays are read-only, since all users share the memory.

    The mapping keeps the memory of all its tensors alive. A tensor keeps the memory of its read item alive: a small
    tensor shares it with the tensors beside it.
    """

    __slots__ = ("_firsts", "_items", "_leases", "_table", "_ties", "_transfer")

    def __init__(
        self,
        transfer: BufferedTransfer,
        items: Sequence[ReadItem],
        leases: Sequence[Lease | None],
        ties: Mapping[str, str] | None = None,
    ) -> None:
        self._transfer = transfer
        self._table = transfer.checkpoint.shards[0].header.table
        self._items = items
        self._leases = leases
        self._firsts = [item.first for item in items]
        self._ties = ties or {}
        """Further names of these tensors: for each, the name under which the shard stores the tensor."""

    def with_ties(self, ties: Mapping[str, str]) -> ShardTensors:
        """Return a mapping of these tensors with further names: `ties` has the stored name of each."""
        return ShardTensors(self._transfer, self._items, self._leases, ties)

    def __getitem__(self, name: str) -> Any:
        index = self._find(name)
        if index < 0:
            raise KeyError(name)
        return self._at(index)

    def _at(self, index: int) -> Any:
        number = bisect_right(self._firsts, index) - 1
        return frozen(self._transfer.view(self._items[number], self._leases[number], index))

    def _find(self, name: str) -> int:
        """Return the index in the shard of a tensor of this mapping; -1 if the mapping does not have it."""
        index = self._table.find(self._ties.get(name, name))
        return index if self._items and self._items[0].first <= index < self._items[-1].last else -1

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) >= 0

    def __iter__(self) -> Iterator[str]:
        stored = range(self._items[0].first, self._items[-1].last) if self._items else ()
        return chain(map(self._table.name, stored), self._ties)

    def __len__(self) -> int:
        return (self._items[-1].last - self._items[0].first if self._items else 0) + len(self._ties)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors of {self._transfer.checkpoint.shards[0].path}>"


def frozen(tensor: Any) -> Any:
    """Return the tensor, made read-only if it is a NumPy array. A torch tensor cannot be read-only."""
    if isinstance(tensor, np.ndarray):
        tensor.flags.writeable = False
    return tensor
