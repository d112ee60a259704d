"""Transfer straight into destinations: bytes are copied once, from the page cache or the socket to the parameter.

Contiguous destinations need no buffer and no budget. A strided destination, one of another dtype, and a sink get their
tensor through charged buffers, in blocks of at most `chunk_size` bytes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from asyncshard._core import Lease
from asyncshard.arrays.base import ArrayLibrary
from asyncshard.arrays.memory import Sink
from asyncshard.pipeline.checkpoint.ties import AskedTies, asked_ties, config_ties_embeddings, with_asked_ties
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.pipeline.transfer.destinations import (
    MatchedDestinations,
    SecondCopy,
    ShardDestinations,
    StridedTarget,
    new_destinations,
)
from asyncshard.pipeline.transfer.load import Delivery, Load, OpenedCheckpoint
from asyncshard.pipeline.transfer.matching import match_destinations
from asyncshard.pipeline.transfer.shared_memory import FirstCopies, copies_differ
from asyncshard.pipeline.transfer.transfer import Reading, Transfer
from asyncshard.plan.items import GRAIN, ReadItem, TensorKey, placed_tensors

T = TypeVar("T")

_MAX_TENSORS = 4096
"""A read item has at most 4,096 tensors: one call that reads into so many buffers holds the GIL for a short time."""
_MANY_TENSORS = 256
"""If an item has 256 tensors or more, their memory is looked up in a thread: it takes 1 µs for each tensor."""


class ToNewArrays(Delivery):
    """Delivers every tensor in a new array, which does not count against the budget."""

    async def plan(self, opened: OpenedCheckpoint) -> PlacedTransfer:
        load, reading = opened
        return await reading.threads.run(self._plan, load, await reading.with_ties())

    def _plan(self, load: Load, reading: Reading) -> PlacedTransfer:
        transfer = PlacedTransfer(reading, new_destinations(reading.checkpoint, load.library()))
        transfer.plan(load.budget)
        return transfer


class ToDestinations(Delivery):
    """Delivers tensors in arrays, tensors and sinks of the caller.

    Parameters
    ----------
    destinations : mapping of str to array, tensor or Sink
        The destination of each tensor by its name.
    strict : bool
        Whether missing and unexpected names are an error.
    cast : bool
        Whether elements may be converted to the destination's dtype.
    """

    def __init__(self, destinations: Mapping[str, Any], *, strict: bool, cast: bool) -> None:
        self._destinations = destinations
        self._strict = strict
        self._cast = cast

    async def plan(self, opened: OpenedCheckpoint) -> PlacedTransfer:
        return await self.match(opened, lambda matched: self._place(matched, opened.load.budget))

    async def match(self, opened: OpenedCheckpoint, then: Callable[[Matched], T]) -> T:
        """Find the destination of every tensor, tied ones among them; return what `then` makes of it in a thread.

        Raises
        ------
        NamesError, DestinationError
            See `match_destinations`.
        """
        load, reading = opened
        checkpoint, threads = reading.checkpoint, reading.threads

        def look() -> tuple[ArrayLibrary, AskedTies]:
            return load.library(self._destinations), asked_ties(checkpoint, self._destinations)

        library, asked = await threads.run(look)
        if asked.missing_output is not None and not await config_ties_embeddings(checkpoint.reader.store, threads):
            asked = asked._replace(missing_output=None)

        def match() -> T:
            whole = with_asked_ties(checkpoint, asked, self._destinations, library, threads)
            destinations = match_destinations(
                whole,
                self._destinations,
                library,
                strict=self._strict,
                cast=self._cast,
                path=whole.reader.store.url,
            )
            return then(Matched(reading._replace(checkpoint=whole), destinations, library))

        return await threads.run(match)

    @staticmethod
    def _place(matched: Matched, budget: MemoryBudget) -> PlacedTransfer:
        transfer = PlacedTransfer(matched.reading, matched.destinations)
        transfer.plan(budget)
        return transfer


class Matched(NamedTuple):
    """A checkpoint, and the destinations of its tensors."""

    reading: Reading
    destinations: MatchedDestinations
    library: ArrayLibrary


class PlacedTransfer(Transfer):
    """Reads tensors into the caller's memory, or into new arrays.

    Parameters
    ----------
    reading : Reading
    matched : MatchedDestinations
    into : list of ShardDestinations, optional
        Memory into which tensors are read instead, and where they wait until they are copied to their destinations.
    """

    is_in_place = True

    def __init__(
        self, reading: Reading, matched: MatchedDestinations, into: list[ShardDestinations] | None = None
    ) -> None:
        super().__init__(reading)
        self._destinations = matched.shards if into is None else into
        self.missing = matched.missing
        self.unexpected = matched.unexpected
        self.narrowed = matched.narrowed
        self._begun: set[ReadItem] = set()
        self._done: set[ReadItem] = set()
        self._parts_left: Counter[TensorKey] = Counter()
        """For each tensor that is split into several items: the number of items that have not been delivered."""
        self._written: Counter[TensorKey] = Counter()
        """For each sink, the number of bytes that it has taken."""
        self._sink_advanced = asyncio.Condition()
        self._first_copies = FirstCopies()
        self._unwanted = memoryview(b"")
        """Memory for bytes between wanted tensors. All reads write into it, and nobody reads it."""

    def plan(self, budget: MemoryBudget) -> None:
        """Make the read items. This is slow for large checkpoints: call it off the event loop."""
        limit = self.pacing.chunk_size
        if any(shard.indirect for shard in self._destinations):
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
                    is_alone=destinations.is_indirect(),
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
        return item.nbytes if self._indirect(item) is not None else 0

    def _indirect(self, item: ReadItem) -> StridedTarget | Sink | SecondCopy | None:
        """Return the destination of an item that is read through a buffer; None for others.

        Such an item has one tensor, or a block of one.
        """
        return self._destinations[item.shard].indirect.get(item.first)

    async def read(self, item: ReadItem, lease: Lease | None) -> None:
        self._begun.add(item)
        indirect = self._indirect(item)
        if indirect is None:
            if item.nbytes:
                shard = self.checkpoint.shards[item.shard]
                is_long = item.last - item.first >= _MANY_TENSORS
                memory = await self._threads.run(self._memory, item) if is_long else self._memory(item)
                await self.checkpoint.reader.read_into(shard, item.start, memory)
        elif lease is not None:
            data = memoryview(lease)[: item.nbytes]
            await self._read_range(item, data)
            await self._pass_on(item, indirect, data)
        self._done.add(item)
        await self._first_copies.note(item)

    def _memory(self, item: ReadItem) -> list[memoryview]:
        """Return the memory that an item fills, in the order of the file."""
        memory = self._destinations[item.shard].memory
        if item.last - item.first == 1:
            return [memory(item.first, self._offset(item), item.nbytes)]
        table = self.checkpoint.shards[item.shard].header.table
        targets = self._destinations[item.shard].targets
        sizes = (table.stops[item.first : item.last] - table.starts[item.first : item.last]).tolist()
        return [
            memory(index, 0, size) if targets[index] is not None else self._unwanted[:size]
            for index, size in enumerate(sizes, item.first)
            if size
        ]

    def _offset(self, item: ReadItem) -> int:
        """Return the offset in its tensor at which an item begins."""
        return item.start - int(self.checkpoint.shards[item.shard].header.table.starts[item.first])

    async def _pass_on(self, item: ReadItem, target: StridedTarget | Sink | SecondCopy, data: memoryview) -> None:
        offset = self._offset(item)
        if isinstance(target, SecondCopy):
            await self._first_copies.wait_for(target.first)
            if not await self._threads.run(target.holds, offset, data):
                shard = self.checkpoint.shards[item.shard]
                raise copies_differ(shard.path, target.first_name, shard.header.at(item.first).name)
            return
        if isinstance(target, StridedTarget):
            await self._threads.run(target.store, offset // target.source.itemsize, data)
            return
        key = item.shard, item.first
        async with self._sink_advanced:
            await self._sink_advanced.wait_for(lambda: self._written[key] == offset)
        await target.write(offset, data)
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
        targets = self._destinations[item.shard].targets
        for index in range(item.first, item.last):
            if targets[index] is not None:
                name, _, _, start, stop = row(index)
                yield name, targets[index], stop - start

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
        targets = self._destinations[item.shard].targets
        return [(item.shard, index) for index in range(item.first, item.last) if targets[index] is not None]
