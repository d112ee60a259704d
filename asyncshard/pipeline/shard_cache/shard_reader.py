"""Read shards of an open folder into the shard cache: their headers, whole files, and single tensors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from asyncshard.arrays.base import ArrayLibrary
from asyncshard.errors import ObjectChangedError
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, Selection, refuse_second_cut
from asyncshard.pipeline.checkpoint.opened_file import FileReader, OpenedFile, read_header_of
from asyncshard.pipeline.checkpoint.slicing import covers_gaps, find_plan, slice_shard, with_slice_reader
from asyncshard.pipeline.checkpoint.tied_tensor import find_tied
from asyncshard.pipeline.shard_cache.cache import CachedFile, ShardCache
from asyncshard.pipeline.shard_cache.reads import read_one, read_tied, read_whole, unknown
from asyncshard.pipeline.shard_cache.tensors import ShardTensors
from asyncshard.pipeline.transfer.buffered import BufferedTransfer
from asyncshard.pipeline.transfer.transfer import Reading
from asyncshard.plan.files.layout import is_one_of_several, is_rank_shard
from asyncshard.stores.base import Store
from asyncshard.tasks.threads import DaemonThreads


class OpenedFolder(NamedTuple):
    """One file of a folder whose store is open, and what is needed to read it."""

    store: Store
    name: str
    """The file's name in the store."""
    threads: DaemonThreads
    library: ArrayLibrary
    """The array library that makes the tensors."""


class ShardReader:
    """Reads files into a cache, sliced as a selection says. Its callers pin each `CachedFile` during a read.

    Parameters
    ----------
    cache : ShardCache
    selection : Selection
    chunk_size, prefetch_count : int or None
        The bytes of one read, and the number of read items in flight; None for the store's defaults.
    """

    def __init__(
        self, cache: ShardCache, selection: Selection, *, chunk_size: int | None, prefetch_count: int | None
    ) -> None:
        self._cache = cache
        self._selection = selection
        self._chunk_size = chunk_size
        self._prefetch_count = prefetch_count

    async def read_header(self, opened: OpenedFolder) -> OpenedFile:
        """Open a file and read its header; return it with the slice that the selection wants of it.

        Raises
        ------
        CheckpointError
            A tensor cannot be divided as the tp plan says, or the file is a rank shard, which must not be cut again.
        FormatError, BudgetError, StoreError
        """
        return await self._read_header(opened, is_sliced=self._selection.is_sliced)

    async def _read_header(self, opened: OpenedFolder, *, is_sliced: bool) -> OpenedFile:
        if is_rank_shard(opened.name, self._selection.pattern):
            refuse_second_cut(self._selection, opened.store.path_of(opened.name))
        account = self._cache.open_account()  # for the header while it is parsed
        try:
            shard = await read_header_of(opened.store, opened.name, opened.threads, self._selection.limits, account)
            if is_sliced:
                plan = await find_plan(opened.store, self._selection, opened.threads)
                shard = await opened.threads.run(slice_shard, shard, self._selection, plan)
            return shard
        finally:
            self._cache.discard(account)

    async def read_file(self, opened: OpenedFolder, file: CachedFile) -> ShardTensors:
        """Return all tensors of a file; see `read_whole`."""
        async with self._transfer(opened, file.shard) as transfer:
            return await read_whole(transfer, file, self._cache, opened.threads, self._selection)

    async def read_tensor(
        self, opened: OpenedFolder, file: CachedFile, name: str, *, is_whole_model: bool
    ) -> ShardTensors:
        """Read one tensor of a file, or the tensor to which its name is tied; return a mapping that has the name.

        If no other file may hold the name, ``config.json`` is read for ties, too. That is so if the caller knows it
        (`is_whole_model`), or if the file's name is not that of one file of several.

        Raises
        ------
        NamesError
            There is no such tensor, and no tie.
        ObjectChangedError
            The file has been replaced since its header was read.
        CheckpointError, BudgetError, StoreError
        """
        if name in file.shard.header:
            async with self._transfer(opened, file.shard) as transfer:
                return await read_one(transfer, file, self._cache, name)
        whole = file.shard
        if self._selection.is_sliced:  # the plan may have another rule for the name, or the filter may want it alone
            whole = await self._read_header(opened, is_sliced=False)
            if whole.meta != file.shard.meta:
                raise ObjectChangedError(f"{whole.path}: the file was replaced meanwhile", path=whole.path)
        is_whole_model = is_whole_model or not is_one_of_several(opened.name)
        tied = await find_tied(
            opened.store, whole, name, self._selection, opened.threads, is_whole_model=is_whole_model
        )
        if tied is None:
            raise unknown(file.shard.path, name)
        async with self._transfer(opened, tied.alone or file.shard) as transfer:
            return await read_tied(transfer, file, self._cache, name, tied)

    @asynccontextmanager
    async def _transfer(self, opened: OpenedFolder, shard: OpenedFile) -> AsyncIterator[BufferedTransfer]:
        checkpoint = Checkpoint((shard,), FileReader(opened.store))
        pacing = opened.store.pacing.override(self._chunk_size, self._prefetch_count)
        account = self._cache.open_account()  # for the scratch with which slices are read
        try:
            if shard.slice is not None:
                is_covering = await opened.threads.run(covers_gaps, checkpoint, pacing.max_gap_bytes)
                checkpoint = with_slice_reader(
                    checkpoint, opened.threads, account, chunk_size=pacing.chunk_size, is_covering=is_covering
                )
            yield BufferedTransfer(Reading(checkpoint, pacing, opened.threads), opened.library)
        finally:
            self._cache.discard(account)
