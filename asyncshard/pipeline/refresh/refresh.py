"""A refresh reads the tensors that differ from a version, into memory of the budget or into their destinations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Lease
from asyncshard._typing import Int64Array
from asyncshard.errors import BudgetError, ChecksumError
from asyncshard.format.digests import Digest, digests_of, load_digest
from asyncshard.pipeline.checkpoint.version import CheckpointVersion, changes_since, version_of
from asyncshard.pipeline.memory.budget import Account, MemoryBudget, charge_of
from asyncshard.pipeline.refresh.changes import ChangedTensors, StagingLayout
from asyncshard.pipeline.refresh.update import Update
from asyncshard.pipeline.transfer.destinations import MatchedDestinations, ShardDestinations, are_equal
from asyncshard.pipeline.transfer.load import Delivery, OpenedCheckpoint
from asyncshard.pipeline.transfer.placed import Matched, PlacedTransfer, ToDestinations
from asyncshard.pipeline.transfer.shared_memory import copies_differ
from asyncshard.pipeline.transfer.transfer import Reading
from asyncshard.plan.items import ReadItem
from asyncshard.tasks.yielding import yielding_gil

_SPACING = 64
"""Staged tensors begin at multiples of 64 bytes, a cache line."""
_EMPTY: Any = object()
"""The owner of the staged memory if all staged tensors have no bytes, so that there is no lease."""


class Refresh(Delivery):
    """The delivery of one `prepare_refresh`: it plans the transfer, and makes the update after the transfer's end.

    Parameters
    ----------
    since : CheckpointVersion or None
        The version that the destinations hold; None reads everything.
    destinations : mapping of str to array, tensor or Sink
        The live weights.
    strict, cast : bool
        As for `ToDestinations`.
    is_staged : bool
        Whether tensors are read into memory of the budget, rather than into the destinations.
    """

    def __init__(
        self,
        since: CheckpointVersion | None,
        destinations: Mapping[str, Any],
        *,
        strict: bool,
        cast: bool,
        is_staged: bool,
    ) -> None:
        self._since = since
        self._into = ToDestinations(destinations, strict=strict, cast=cast)
        self._is_staged = is_staged
        self._cast = cast
        self._account: Account | None = None
        self._changes: ChangedTensors | None = None
        self._changed: tuple[str, ...] = ()
        self._transfer: RefreshTransfer | None = None

    async def plan(self, opened: OpenedCheckpoint) -> RefreshTransfer:
        """Find the tensors that have changed, reserve memory for them, and plan how they are read.

        Raises
        ------
        BudgetError
            The changed tensors exceed the budget.
        FormatError
            A shard's digests are malformed.
        ImportError
            There are digests, and the package that computes them is not installed.
        """
        budget, threads = opened.load.budget, opened.reading.threads
        matched, changes, layout = await self._into.match(opened, self._compare)
        lease = None
        if self._is_staged:
            lease = await self._allocate(layout.nbytes, matched.reading, budget)
            changes.lease, changes.offsets = lease, layout.offsets
        self._changes = changes

        def make() -> RefreshTransfer:
            # What lies between changed tensors is left out, however narrow: the point is to read little.
            pacing = matched.reading.pacing._replace(max_gap_bytes=0)
            into = _stage(matched.destinations, layout.offsets, lease) if self._is_staged else None
            transfer = RefreshTransfer(matched.reading._replace(pacing=pacing), matched.destinations, into)
            transfer.plan(budget)
            return transfer

        self._transfer = await threads.run(make)
        return self._transfer

    def _compare(self, matched: Matched) -> tuple[Matched, ChangedTensors, StagingLayout]:
        """Leave of the destinations those of tensors that have changed, and lay these out in memory."""
        checkpoint, pacing, _ = matched.reading
        shards = matched.destinations.shards
        if self._since is not None:
            matched.destinations.keep(list(changes_since(self._since, checkpoint, version_of(checkpoint))))
        changes = ChangedTensors(checkpoint, shards, matched.library, pacing.chunk_size, cast=self._cast)
        self._changed = changes.names()
        return matched, changes, changes.lay_out(_SPACING)

    async def _allocate(self, nbytes: int, reading: Reading, budget: MemoryBudget) -> Lease | None:
        if not nbytes:
            return None
        checkpoint, url = reading.checkpoint, reading.checkpoint.reader.store.url
        needed = charge_of(nbytes) + sum(shard.nbytes for shard in checkpoint.shards) + checkpoint.scratch_bytes
        if needed > budget.nbytes:
            raise BudgetError(
                f"{url}: what has changed and the headers need {needed:,} bytes at once, more than the memory "
                f"budget of {budget.nbytes:,} bytes; raise memory_budget_mb to {-(-needed >> 20)} or more, or "
                "pass stage=False, which writes into the live weights",
                path=url,
                needed_bytes=needed,
                budget_bytes=budget.nbytes,
            )
        self._account = budget.open_account()
        return await self._account.allocate_alone(nbytes)

    def finish(self) -> Update:
        """Return the update, after everything was read. From now on it owns the memory."""
        transfer, changes, account = self._transfer, self._changes, self._account
        assert transfer is not None
        assert changes is not None
        self._changes = self._account = None
        transfer.let_go()
        return Update(
            transfer.version, changes, self._changed, account, transfer.bytes_total, is_staged=self._is_staged
        )

    async def abandon(self) -> None:
        """Give the memory back, after all reads have stopped. A cancel does not interrupt it."""
        if self._changes is not None:
            self._changes.lease = None
        if self._transfer is not None:
            self._transfer.let_go()
        account, self._account = self._account, None
        if account is not None:
            await account.aclose()


def _stage(matched: MatchedDestinations, offsets: list[Int64Array], lease: Lease | None) -> list[ShardDestinations]:
    """Return destinations within a lease for the tensors that have a destination."""
    base = 0 if lease is None else lease.address
    owner = _EMPTY if lease is None else lease
    staged = []
    for shard, shard_offsets in zip(matched.shards, offsets, strict=True):
        destinations = ShardDestinations.empty()
        destinations.targets = [None if target is None else owner for target in shard.targets]
        destinations.addresses.frombytes((shard_offsets + base).astype(np.uint64).tobytes())
        destinations.firsts = shard.firsts
        staged.append(destinations)
    return staged


class RefreshTransfer(PlacedTransfer):
    """Reads like `PlacedTransfer`, and compares the tensors that were read with the digests in the headers.

    Without staging, tensors for strided destinations, for destinations of another dtype and for sinks are not compared.
    """

    def __init__(
        self, reading: Reading, matched: MatchedDestinations, into: list[ShardDestinations] | None = None
    ) -> None:
        super().__init__(reading, matched, into)
        self._is_staged = into is not None

    def plan(self, budget: MemoryBudget) -> None:
        super().plan(budget)
        self._digests: list[NDArray[np.uint8] | None] = []
        for shard, destinations in zip(self.checkpoint.shards, self._destinations, strict=True):
            is_read = bool(destinations.is_wanted().any())
            self._digests.append(digests_of(shard.header, path=shard.path) if is_read else None)
        self._digest: Digest | None = None
        if any(digests is not None for digests in self._digests):
            self._digest = load_digest()
        self._parts_unread = Counter((item.shard, item.first) for item in self.items if item.last - item.first == 1)

    def let_go(self) -> None:
        """Drop the destinations, so that an error that refers to this transfer does not keep them alive."""
        self._destinations = []

    async def read(self, item: ReadItem, lease: Lease | None) -> None:
        await super().read(item, lease)
        if self._is_staged and self._destinations[item.shard].firsts:
            await self._compare_copies(item)
        if self._digests[item.shard] is None or self._indirect(item) is not None:
            return
        if item.last - item.first == 1:
            self._parts_unread[item.shard, item.first] -= 1
            if self._parts_unread[item.shard, item.first]:
                return
        try:
            await self._threads.run(self._verify, item)
        except ChecksumError:
            self._done.discard(item)
            raise

    async def _compare_copies(self, item: ReadItem) -> None:
        """Compare the second copies in an item with their first copies. All of them are staged."""
        shard, destinations = self.checkpoint.shards[item.shard], self._destinations[item.shard]
        for index in range(item.first, item.last):
            first = destinations.firsts.get(index)
            if first is None:
                continue
            await self._first_copies.wait_for(first)
            name, _, _, start, stop = shard.header.table.row(index)
            offset, nbytes = max(item.start - start, 0), min(item.stop, stop) - max(item.start, start)
            copies = [self._destinations[first[0]].memory(first[1], offset, nbytes)]
            copies.append(destinations.memory(index, offset, nbytes))
            if not await self._threads.run(are_equal, *copies):
                raise copies_differ(shard.path, self.checkpoint.shards[first[0]].header.at(first[1]).name, name)

    def _verify(self, item: ReadItem) -> None:
        """Compare the tensors that this item completes with their digests."""
        shard, destinations, digests = (
            self.checkpoint.shards[item.shard],
            self._destinations[item.shard],
            self._digests[item.shard],
        )
        assert digests is not None
        assert self._digest is not None
        for index in yielding_gil(range(item.first, item.last)):
            if destinations.targets[index] is None:
                continue
            name, _, _, start, stop = shard.header.table.row(index)
            if self._digest(destinations.memory(index, 0, stop - start)) != digests[index].tobytes():
                raise ChecksumError(
                    f"{shard.path}: tensor {name!r} does not match its digest (xxh3-128) in the header: the file is "
                    "damaged, or was changed without its metadata; write or fetch it again",
                    path=shard.path,
                    tensor=name,
                    start=start,
                    stop=stop,
                )

    def progress(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ((), ()) if self._is_staged else super().progress()
