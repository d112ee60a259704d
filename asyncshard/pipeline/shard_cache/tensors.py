"""The tensors of one shard in memory, made when they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from asyncshard._core import Lease
from asyncshard.pipeline.transfer.buffered import BufferedTransfer
from asyncshard.plan.items import ReadItem


class ShardTensors(Mapping[str, Any]):
    """Tensors by name, in the order of their bytes. Immutable; NumPy arrays of it are read-only, since all share them.

    Each look-up makes a new view of the same memory. This mapping keeps all of its shard's memory alive; a tensor keeps
    that of its read item: its own, or, for small ones, that of their neighbours too.
    """

    __slots__ = ("_firsts", "_items", "_leases", "_table", "_transfer")

    def __init__(self, transfer: BufferedTransfer, items: Sequence[ReadItem], leases: Sequence[Lease | None]) -> None:
        self._transfer = transfer
        self._table = transfer.checkpoint.shards[0].header.table
        self._items = items
        self._leases = leases
        self._firsts = [item.first for item in items]

    def __getitem__(self, name: str) -> Any:
        index = self._table.find(name)
        if index < 0 or not self._has(index):
            raise KeyError(name)
        return self._at(index)

    def _at(self, index: int) -> Any:
        place = bisect_right(self._firsts, index) - 1
        return frozen(self._transfer.view(self._items[place], self._leases[place], index))

    def _has(self, index: int) -> bool:
        return bool(self._items) and self._items[0].first <= index < self._items[-1].last

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._has(self._table.find(name))

    def __iter__(self) -> Iterator[str]:
        if not self._items:
            return iter(())
        return map(self._table.name, range(self._items[0].first, self._items[-1].last))

    def __len__(self) -> int:
        return self._items[-1].last - self._items[0].first if self._items else 0

    def __repr__(self) -> str:
        return f"<{len(self)} tensors of {self._transfer.checkpoint.shards[0].path}>"


def frozen(tensor: Any) -> Any:
    """Return the tensor, read-only where it is a NumPy array; torch has no such thing."""
    if isinstance(tensor, np.ndarray):
        tensor.flags.writeable = False
    return tensor
