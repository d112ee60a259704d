"""Transfer through buffers of the memory budget: a stream without destinations delivers its tensors in this way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from asyncshard._core import Lease, spread
from asyncshard._typing import Int64Array
from asyncshard.arrays.base import ArrayLibrary, make_view
from asyncshard.errors import BudgetError
from asyncshard.format.dtypes import DTYPES
from asyncshard.pipeline.memory.budget import MemoryBudget, charge_of
from asyncshard.pipeline.transfer.load import Delivery, Load, OpenedCheckpoint
from asyncshard.pipeline.transfer.transfer import Reading, Transfer
from asyncshard.plan.items import ReadItem, whole_tensors

_ALIGNMENT = 8
"""Tensors are aligned to 8 bytes, the size of the widest element of the format."""
_MAX_TENSORS = 4096
"""A read item has at most 4,096 tensors: `deliver` looks at all of them first, on the event loop, in about 0.1 ms."""
_ITEM_BYTES = np.array([max(dtype.bits // 8, 1) for dtype in DTYPES], np.int64)
"""For each dtype, by its code: the bytes of one element, at least 1."""


class ToBuffers(Delivery):
    """Delivers tensors in buffers of the budget, as a stream without destinations does."""

    async def plan(self, opened: OpenedCheckpoint) -> BufferedTransfer:
        load, reading = opened
        return await reading.threads.run(self._plan, load, await reading.with_ties())

    def _plan(self, load: Load, reading: Reading) -> BufferedTransfer:
        transfer = self._transfer(reading, load.library())
        transfer.plan(load.budget, is_strict=load.is_strict)
        return transfer

    def _transfer(self, reading: Reading, library: ArrayLibrary) -> BufferedTransfer:
        return BufferedTransfer(reading, library)


class BufferedTransfer(Transfer):
    """Reads items of whole tensors into leased buffers. A tensor is a view of its item's buffer.

    The tensors of one item share a lease, which is charged to the budget until the last of them dies. If a tensor of an
    item would not be aligned for its dtype, all tensors of the item are moved apart within the buffer after the read.
    """

    is_in_place = False

    def __init__(self, reading: Reading, library: ArrayLibrary) -> None:
        super().__init__(reading)
        self._library = library
        self.bytes_total = self.checkpoint.bytes_total
        self.tensors_total = self.checkpoint.tensors_total
        self._misaligned: frozenset[ReadItem] = frozenset()

    def plan(self, budget: MemoryBudget, *, is_strict: bool) -> None:
        """Make the read items. This is slow for large checkpoints: call it off the event loop.

        Raises
        ------
        BudgetError
            A tensor is larger than the budget; or, with `is_strict`, two neighbouring items and the headers are.
        """
        # Four items fit into the budget, so that some can be read ahead.
        limit = max(min(self.pacing.chunk_size, budget.nbytes // 4), 1)
        items: list[ReadItem] = []
        for number, shard in enumerate(self.checkpoint.shards):
            table = shard.header.table
            items.extend(whole_tensors(number, table.starts, table.stops, limit=limit, max_tensors=_MAX_TENSORS))
        self.items = items
        self._misaligned = frozenset(item for item in items if self._has_misaligned(item))
        for item in items:
            if item.nbytes > budget.nbytes:
                raise self._too_large(item, budget)
        if is_strict:
            self._require_pairs(budget)

    def _too_large(self, item: ReadItem, budget: MemoryBudget) -> BudgetError:
        shard = self.checkpoint.shards[item.shard]
        sizes = shard.header.table.stops[item.first : item.last] - shard.header.table.starts[item.first : item.last]
        name = shard.header.at(item.first + int(np.argmax(sizes))).name
        size = int(sizes.max())
        return BudgetError(
            f"{shard.path}: tensor {name!r} has {size:,} bytes, more than the memory budget of "
            f"{budget.nbytes:,} bytes; "
            f"raise memory_budget_mb to {-(-size >> 20)} or more, or give it a destination (into=)",
            path=shard.path,
            tensor=name,
            needed_bytes=size,
            budget_bytes=budget.nbytes,
        )

    def _require_pairs(self, budget: MemoryBudget) -> None:
        headers = sum(shard.nbytes for shard in self.checkpoint.shards) + self.checkpoint.scratch_bytes
        charges = [charge_of(self.buffer_bytes(item)) for item in self.items]
        for index, pair in enumerate(zip(charges, charges[1:] or [0], strict=False)):
            if headers + sum(pair) > budget.nbytes:
                shard = self.checkpoint.shards[self.items[index].shard]
                name = shard.header.at(self.items[index].first).name
                raise BudgetError(
                    f"{shard.path}: with strict_budget the tensor {name!r} and the one read after it need "
                    f"{sum(pair):,} bytes beside {headers:,} bytes of headers, more than the memory budget of "
                    f"{budget.nbytes:,} bytes; raise memory_budget_mb",
                    path=shard.path,
                    tensor=name,
                    needed_bytes=headers + sum(pair),
                    budget_bytes=budget.nbytes,
                )

    def buffer_bytes(self, item: ReadItem) -> int:
        if item.nbytes == 0:
            return 0
        return item.nbytes + (_ALIGNMENT * (item.last - item.first + 1) if self._is_misaligned(item) else 0)

    def _is_misaligned(self, item: ReadItem) -> bool:
        return item in self._misaligned

    def _has_misaligned(self, item: ReadItem) -> bool:
        if item.last - item.first == 1:
            return False
        table = self.checkpoint.shards[item.shard].header.table
        offsets = table.starts[item.first : item.last] - item.start
        return bool(np.any(offsets % _ITEM_BYTES[table.dtype_codes[item.first : item.last]]))

    def _offsets(self, item: ReadItem) -> Int64Array:
        """Return for each tensor of an item the offset in the item's buffer at which it begins."""
        offsets = self.checkpoint.shards[item.shard].header.table.starts[item.first : item.last] - item.start
        if self._is_misaligned(item):
            # Each tensor is moved by 8 bytes more than the one before it, so that they never overlap.
            offsets = -(-offsets // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT * np.arange(len(offsets))
        return offsets

    async def read(self, item: ReadItem, lease: Lease | None) -> None:
        if lease is None:
            return
        buffer = memoryview(lease)
        await self._read_range(item, buffer)
        if self._is_misaligned(item):
            table = self.checkpoint.shards[item.shard].header.table
            starts = table.starts[item.first : item.last]
            lengths = table.stops[item.first : item.last] - starts
            await self._threads.run(spread, buffer, starts - item.start, self._offsets(item), lengths)

    def view(self, item: ReadItem, lease: Lease | None, index: int) -> Any:
        """Return the tensor at `index` of the shard, from an item that was read. The tensor keeps the lease alive."""
        shard = self.checkpoint.shards[item.shard]
        name, code, shape, start, stop = shard.header.table.row(index)
        offset = start - item.start
        if self._is_misaligned(item):
            offset = int(self._offsets(item)[index - item.first])
        return make_view(self._library, lease, offset, DTYPES[code], shape, stop - start, name=name, path=shard.path)

    def deliver(self, item: ReadItem, lease: Lease | None) -> Iterator[tuple[str, Any, int]]:
        shard = self.checkpoint.shards[item.shard]
        row = shard.header.table.row
        library = self._library
        for index, offset in zip(range(item.first, item.last), self._offsets(item).tolist(), strict=True):
            name, code, shape, start, stop = row(index)
            # No variable refers to the tensor: it would keep it alive while the consumer has it.
            yield (
                name,
                make_view(library, lease, offset, DTYPES[code], shape, stop - start, name=name, path=shard.path),
                stop - start,
            )
