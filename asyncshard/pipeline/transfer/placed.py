"""Tensors straight into their destinations: one copy, from page cache or socket to the parameter.

Contiguous destinations need no buffer and no budget. A strided one, one of another dtype, and a sink get their tensor
in blocks of at most `chunk_size` through charged buffers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

from asyncshard._core import Lease
from asyncshard.arrays.memory import Sink
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.pipeline.transfer.destinations import MatchedDestinations, SecondCopy, StridedTarget, TensorKey
from asyncshard.pipeline.transfer.second_copies import FirstCopies, copies_differ
from asyncshard.pipeline.transfer.transfer import Pacing, Transfer
from asyncshard.plan.items import GRAIN, ReadItem, placed_tensors
from asyncshard.stores.base import Store
from asyncshard.tasks.threads import DaemonThreads

_MAX_TENSORS = 4096
"""In one item: what reading into separate buffers handles in one call without holding the GIL for long."""
_MANY_TENSORS = 256
"""From as many in an item on, their memory is looked up in a thread: it takes a microsecond for each."""


class PlacedTransfer(Transfer):
    """Read into the caller's memory, or into new arrays."""

    is_in_place = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        store: Store,
        pacing: Pacing,
        placement: MatchedDestinations,
        threads: DaemonThreads,
    ) -> None:
        super().__init__(checkpoint, store, pacing)
        self._destinations = placement.shards
        self._threads = threads
        self.missing = placement.missing
        self.unexpected = placement.unexpected
        self.narrowed = placement.narrowed
        self._begun: set[ReadItem] = set()
        self._done: set[ReadItem] = set()
        self._parts_left: Counter[TensorKey] = Counter()
        """Items still to be delivered of the tensors that are split."""
        self._written: Counter[TensorKey] = Counter()
        """Bytes that each sink has taken."""
        self._sink_advanced = asyncio.Condition()
        self._first_copies = FirstCopies()
        self._unwanted = memoryview(b"")
        """Takes what lies between wanted tensors, of all reads at once: nobody looks at it."""

    def plan(self, budget: MemoryBudget) -> None:
        """Make the items. Slow for large checkpoints: not for the event loop."""
        limit = self.pacing.chunk_size
        if any(shard.staged for shard in self._destinations):
            limit = max(min(limit, budget.nbytes // 4), GRAIN)
        items: list[ReadItem] = []
        for number, (shard, destinations) in enumerate(zip(self.checkpoint.shards, self._destinations, strict=True)):
            table = shard.header.table
            wanted = destinations.is_wanted()
            items.extend(
                placed_tensors(
                    number,
                    table.starts,
                    table.stops,
                    is_wanted=wanted,
                    is_alone=destinations.is_staged(),
                    limit=limit,
                    max_tensors=_MAX_TENSORS,
                    max_gap=self.pacing.max_gap_bytes,
                )
            )
            self.tensors_total += int(wanted.sum())
            self.bytes_total += int((table.stops - table.starts)[wanted].sum())
        if self.pacing.max_gap_bytes and not all(shard.is_wanted().all() for shard in self._destinations):
            self._unwanted = memoryview(bytearray(self.pacing.max_gap_bytes))
        self.items = items
        self._first_copies.expect({key for shard in self._destinations for key in shard.firsts.values()}, items)
        self._parts_left.update((item.shard, item.first) for item in items if item.last - item.first == 1)

    def buffer_bytes(self, item: ReadItem) -> int:
        return item.nbytes if self._staged(item) is not None else 0

    def _staged(self, item: ReadItem) -> StridedTarget | Sink | SecondCopy | None:
        """Return the destination of an item that goes through a buffer; such a tensor is alone in its items."""
        return self._destinations[item.shard].staged.get(item.first)

    async def read(self, item: ReadItem, lease: Lease | None) -> None:
        self._begun.add(item)
        staged = self._staged(item)
        if staged is None:
            if item.nbytes:
                meta = self.checkpoint.shards[item.shard].meta
                is_long = item.last - item.first >= _MANY_TENSORS
                memory = await self._threads.run(self._memory, item) if is_long else self._memory(item)
                await self._store.read_into(meta, item.start, memory)
        elif lease is not None:
            data = memoryview(lease)[: item.nbytes]
            await self._read_range(item, data)
            await self._pass_on(item, staged, data)
        self._done.add(item)
        await self._first_copies.note(item)

    def _memory(self, item: ReadItem) -> list[memoryview]:
        """Return the destinations' memory that an item fills, in the file's order."""
        memory = self._destinations[item.shard].memory
        if item.last - item.first == 1:
            return [memory(item.first, self._offset(item), item.nbytes)]
        table = self.checkpoint.shards[item.shard].header.table
        given = self._destinations[item.shard].given
        sizes = (table.stops[item.first : item.last] - table.starts[item.first : item.last]).tolist()
        return [
            memory(index, 0, size) if given[index] is not None else self._unwanted[:size]
            for index, size in enumerate(sizes, item.first)
            if size
        ]

    def _offset(self, item: ReadItem) -> int:
        """Return where in its tensor an item begins."""
        return item.start - int(self.checkpoint.shards[item.shard].header.table.starts[item.first])

    async def _pass_on(self, item: ReadItem, staged: StridedTarget | Sink | SecondCopy, data: memoryview) -> None:
        offset = self._offset(item)
        if isinstance(staged, SecondCopy):
            await self._first_copies.wait_for(staged.first)
            if not await self._threads.run(staged.holds, offset, data):
                shard = self.checkpoint.shards[item.shard]
                raise copies_differ(shard.path, staged.first_name, shard.header.at(item.first).name)
            return
        if isinstance(staged, StridedTarget):
            await self._threads.run(staged.store, offset // staged.source.itemsize, data)
            return
        key = item.shard, item.first
        async with self._sink_advanced:
            await self._sink_advanced.wait_for(lambda: self._written[key] == offset)
        await staged.write(offset, data)
        async with self._sink_advanced:
            self._written[key] = offset + item.nbytes
            self._sink_advanced.notify_all()

    def deliver(self, item: ReadItem, lease: Lease | None) -> Iterator[tuple[str, Any, int]]:
        if item.last - item.first == 1:
            key = item.shard, item.first
            self._parts_left[key] -= 1
            if self._parts_left[key]:
                return
        row = self.checkpoint.shards[item.shard].header.table.row
        given = self._destinations[item.shard].given
        for index in range(item.first, item.last):
            if given[index] is not None:
                name, _, _, start, stop = row(index)
                yield name, given[index], stop - start

    def progress(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        parts: Counter[TensorKey] = Counter()
        parts_done: Counter[TensorKey] = Counter()
        for item in self.items:
            if item in self._begun:
                keys = self._keys(item)
                parts.update(keys)
                parts_done.update(keys if item in self._done else ())
            elif item.last - item.first == 1:
                parts[item.shard, item.first] += 1
        name_of = {key: self.checkpoint.shards[key[0]].header.at(key[1]).name for key in parts}
        filled = tuple(name_of[key] for key, count in parts.items() if parts_done[key] == count)
        begun = {key for item in self._begun for key in self._keys(item)}
        torn = tuple(name_of[key] for key, count in parts.items() if key in begun and parts_done[key] < count)
        return filled, torn

    def _keys(self, item: ReadItem) -> list[TensorKey]:
        given = self._destinations[item.shard].given
        return [(item.shard, index) for index in range(item.first, item.last) if given[index] is not None]
