"""Random access to shards and tensors, with a cache in memory."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, Unpack

from asyncshard._core import WeightMap
from asyncshard.errors import ObjectChangedError
from asyncshard.loaders.files import ModelPath, open_store
from asyncshard.loaders.loader import Loader, Request, inherited
from asyncshard.loaders.options import ReadTuning, require_int
from asyncshard.loaders.sources import Opened, ShardFile, Sources, key_of
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, choose_files, refuse_second_cut
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile, read_header_of
from asyncshard.pipeline.checkpoint.slicing import find_plan, slice_shard, with_slice_reader
from asyncshard.pipeline.checkpoint.ties import embedding_beside, find_tied, possible_tie
from asyncshard.pipeline.memory.budget import Account
from asyncshard.pipeline.shard_cache.cache import CachedFile, CacheStatistics, ShardCache
from asyncshard.pipeline.shard_cache.reads import read_one, read_tied, read_whole, unknown
from asyncshard.pipeline.shard_cache.tensors import ShardTensors
from asyncshard.pipeline.shard_cache.transfer import CachedTransfer
from asyncshard.pipeline.transfer.buffered import BufferedTransfer
from asyncshard.plan.files.layout import is_one_of_several, is_rank_shard
from asyncshard.stores import Store
from asyncshard.tasks.single_flight import SingleFlight
from asyncshard.tasks.threads import DaemonThreads, wait_to_end

T = TypeVar("T")
Callback = Callable[[str, Any], object]
"""Gets name and tensor; what it returns is awaited where it is awaitable."""


class IncrementalShardLoader(Loader):
    """Load shards and single tensors as they are asked for, and keep what was used last in memory.

    The cache is bounded in bytes, headers included, by the memory budget, and in shards by `cache_size`; the least
    recently used shard goes first. A shard is a snapshot of its file: it stays as it was read until it is evicted,
    whatever becomes of the file. Tensors are shared by all who ask: NumPy arrays are read-only, torch tensors, which
    cannot be, must not be written to.

    What somebody still uses of a shard that was evicted counts against the budget, as `bytes_held`, until it dies, or
    until a read can be met in no other way; then it leaves the budget.

    Within ``async with loader:`` files and connections stay open between calls; leaving it, like `aclose`, empties the
    cache. Without it each call that reads opens and closes its own.

    Parameters
    ----------
    base_loader : loader, optional
        Which files, and the options that are not given here; the budget is shared with it.
    memory_budget_mb : float, optional
        Size of a budget of its own, in units of 2**20 bytes.
    cache_size : int, optional
        How many shards may have tensors in the cache; by default the budget alone bounds them.
    **tuning
        See `Options`.

    Raises
    ------
    ValueError, TypeError
        An option out of range, or one that does not exist.
    """

    def __init__(
        self,
        base_loader: Loader | None = None,
        memory_budget_mb: float | None = None,
        cache_size: int | None = None,
        **tuning: Unpack[ReadTuning],
    ) -> None:
        if cache_size is not None:
            require_int("cache_size", cache_size, 1)
        self._cache_size = cache_size
        self._set_up(*inherited(base_loader, {**tuning, "memory_budget_mb": memory_budget_mb}))

    def _set_up(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cache = ShardCache(self.budget, self._cache_size, is_strict=self.options.strict_budget)
        self._headers = SingleFlight()
        self._reads = SingleFlight()
        self._located: dict[str, _Located] = {}
        self._sources = Sources(self.options, self.caching, self.budget)

    def __getstate__(self) -> Any:
        return self._cache_size, super().__getstate__()

    def __setstate__(self, state: Any) -> None:
        self._cache_size, base = state
        self._set_up(*base)

    def __repr__(self) -> str:
        size = self.budget.memory_budget_mb
        return f"IncrementalShardLoader(memory_budget_mb={size!r}, cache_size={self._cache_size!r})"

    async def __aenter__(self) -> Self:
        self._sources.are_kept = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Empty the cache and close files and connections; those in use are closed by the reads that use them.

        The loader may be used again.
        """
        self._sources.are_kept = False
        self.clear()
        self._cache.release()
        await wait_to_end(asyncio.ensure_future(self._close_idle()))

    async def _close_idle(self) -> None:
        await self._sources.aclose()
        await self.budget.trim_in_thread()

    async def load_shard(self, shard_file: ShardFile) -> ShardTensors:
        """Return the tensors of one file: a read-only mapping of name to tensor.

        With a `tp_plan` they are this rank's slices, and with a `tensor_filter` the wanted ones. What the file's
        metadata ties to one of them is among them, in the same memory, unless the plan has a rule for its name.
        `get_tensor` knows it too, and what ``config.json`` ties.

        Tasks that ask for the same file meanwhile share one read. Cancelling one of them disturbs no other; cancelling
        all stops the read.

        Parameters
        ----------
        shard_file : str or path
            A local path or URL of one ``.safetensors`` file.

        Raises
        ------
        BudgetError
            The file's tensors and header exceed the budget.
        FormatError, ObjectNotFoundError, AccessDeniedError, NotRegularFileError, StoreError
            Nothing is remembered of a read that failed.
        """
        key = key_of(shard_file)
        file = self._cache.find(key)
        if file is not None and file.tensors is not None:
            self._cache.hits += 1
            return file.tensors
        self._cache.misses += 1
        return await self._reads.run(key, lambda: self._read(key, shard_file, self._read_whole))

    async def get_tensor(self, path: ShardFile, name: str) -> Any:
        """Return one tensor, reading no other's bytes. A tied one is the tensor that it is tied to, in the same memory.

        Parameters
        ----------
        path : str or path
            A local path or URL of a ``.safetensors`` file, or of a directory or prefix that holds a checkpoint.
        name : str
            Of a tensor that is stored, or tied to one by a file's metadata or by ``config.json``; the latter tells
            nothing of one file of several.

        Raises
        ------
        NamesError
            There is no such tensor.
        BudgetError
            The tensor exceeds the budget.
        FormatError, CheckpointError, StoreError
        """
        is_directory = not os.fspath(path).endswith(".safetensors")
        if is_directory:
            path = await self._file_of(path, name)
        key = key_of(path)
        file = self._cache.find(key)
        tensors = None if file is None else file.tensors or file.lone.get(name)
        if tensors is not None and name in tensors:
            self._cache.hits += 1
            return tensors[name]
        self._cache.misses += 1

        async def read_it(opened: Opened, file: CachedFile) -> ShardTensors:
            if name not in file.shard.header:
                is_whole_model = is_directory or not is_one_of_several(opened.name)
                return await self._read_tied(opened, file, name, is_whole_model=is_whole_model)
            async with self._transfer(opened, file.shard) as transfer:
                return await read_one(transfer, file, self._cache, name)

        tensors = await self._reads.run((key, name, is_directory), lambda: self._read(key, path, read_it))
        return tensors[name]

    async def load_weights_incremental(self, path: ModelPath, callback: Callback) -> None:
        """Call ``callback(name, tensor)`` for every tensor, in plan order; what it returns is awaited if it can be.

        The next shards are read while it runs, at most `prefetch_count` read items ahead and within the budget,
        whatever the size of the checkpoint. Shards in the cache are delivered from there; others pass by it, or a
        large checkpoint would evict everything.

        Raises
        ------
        Exception
            Whatever the callback raises, with a note that names the tensor. The load has stopped then.
        NamesError, CheckpointError, FormatError, BudgetError, StoreError
        """
        async with self._stream(Request(path)) as weights:
            async for name, tensor in weights:
                try:
                    result = callback(name, tensor)
                    if inspect.isawaitable(result):
                        await result
                    del result
                except Exception as error:
                    url = path.url if isinstance(path, Store) else os.fspath(path)
                    error.add_note(f"raised by the callback for tensor {name!r} of {url}")
                    raise
                del tensor  # or it would count as held while the next one is read

    def statistics(self) -> CacheStatistics:
        """Return what the cache has done so far, and what it holds."""
        return self._cache.statistics(reads_in_flight=len(self._reads))

    def evict(self, path: ShardFile) -> bool:
        """Forget a file, or what is known of a checkpoint's files; return whether there was anything.

        The next call reads it again. Tensors in use stay as they are.
        """
        key = key_of(path)
        is_known = self._forget_location(key)
        return self._cache.evict(key) or is_known

    def clear(self) -> None:
        """Forget everything. Tensors in use stay as they are."""
        for key in list(self._located):
            self._forget_location(key)
        self._cache.clear()

    def _staged_transfer(self, *args: Any) -> BufferedTransfer:
        return CachedTransfer(*args, cache=self._cache)

    # Reading, each in a task that the waiters share

    async def _read(
        self,
        key: str,
        path: ShardFile,
        read: Callable[[Opened, CachedFile], Coroutine[Any, Any, T]],
    ) -> T:
        async with self._sources.opened(path) as opened:
            while True:
                known = self._cache.peek(key)
                shard = known.shard if known else await self._headers.run(key, lambda: self._read_header(opened))
                try:
                    with self._cache.pinned(key, shard) as file:
                        return await read(opened, file)
                except ObjectChangedError:
                    if known is None:
                        raise
                    self._cache.evict(key)  # its header was that of the file before

    async def _read_header(self, opened: Opened, *, is_sliced: bool = True) -> OpenedFile:
        if is_rank_shard(opened.name, self._selection.pattern):
            refuse_second_cut(self._selection, opened.store.path_of(opened.name))
        account = self._cache.open_account()  # while it is parsed
        try:
            shard = await read_header_of(
                opened.store,
                opened.name,
                opened.threads,
                max_header_bytes=self._options.max_header_bytes,
                max_tensors=self._options.max_tensors,
                account=account,
            )
            if is_sliced and self._selection.is_sliced:
                plan = await find_plan(opened.store, self._selection, opened.threads)
                shard = await opened.threads.run(slice_shard, shard, self._selection, plan)
            return shard
        finally:
            self._cache.discard(account)

    async def _read_whole(self, opened: Opened, file: CachedFile) -> ShardTensors:
        async with self._transfer(opened, file.shard) as transfer:
            return await read_whole(transfer, file, self._cache, opened.threads, self._selection)

    async def _read_tied(self, opened: Opened, file: CachedFile, name: str, *, is_whole_model: bool) -> ShardTensors:
        """Read a tensor that the file does not hold under this name."""
        whole = file.shard
        if self._selection.is_sliced:  # the plan may divide it otherwise, or the filter want just it
            whole = await self._read_header(opened, is_sliced=False)
            if whole.meta != (file.shard.meta if file.shard.part is None else file.shard.meta.version.whole):
                path = file.shard.path
                raise ObjectChangedError(f"{path}: the file was replaced since its header was read", path=path)
        tied = await find_tied(
            opened.store, whole, name, self._selection, opened.threads, is_whole_model=is_whole_model
        )
        if tied is None:
            raise unknown(file.shard.path, name)
        async with self._transfer(opened, tied.alone or file.shard) as transfer:
            return await read_tied(transfer, file, self._cache, name, tied)

    @asynccontextmanager
    async def _transfer(self, opened: Opened, shard: OpenedFile) -> AsyncIterator[BufferedTransfer]:
        store, checkpoint, pacing = opened.store, Checkpoint((shard,)), self._pacing(opened.store)
        account = self._cache.open_account()  # of the scratch for slices
        try:
            if shard.part is not None:
                store, checkpoint = await with_slice_reader(
                    store, checkpoint, opened.threads, account, chunk_size=pacing.chunk_size
                )
            yield BufferedTransfer(checkpoint, store, pacing, opened.library, opened.threads)
        finally:
            self._cache.discard(account)

    # Where files are

    async def _file_of(self, path: ShardFile, name: str) -> str:
        """Return the path of the file of a checkpoint that holds a tensor."""
        key = key_of(path)
        located = self._located.get(key)
        if located is None:
            located = await self._headers.run(("located", key), lambda: self._locate(key, path))
        if located.weight_map is not None:
            file = located.file_of(name)
            if file is not None:
                return file
        else:
            for file_path in located.paths.values():
                if name in (await self._shard_at(file_path)).header:
                    return file_path
        return await self._file_of_tied(key, located, name)

    async def _file_of_tied(self, key: str, located: _Located, name: str) -> str:
        """Return the path of the file with the tensor to which a name that no file holds may be tied."""
        if name not in located.tied:
            threads = DaemonThreads(1, "asyncshard-work")
            try:
                located.tied[name] = await self._find_file_of_tied(key, located, name, threads)
            finally:
                await threads.aclose()
        return located.tied[name]

    async def _find_file_of_tied(self, key: str, located: _Located, name: str, threads: DaemonThreads) -> str:
        if located.weight_map is not None:
            embedding = await threads.run(embedding_beside, located.weight_map, name)
            file = None if embedding is None else located.file_of(embedding)
            if file is not None:
                return file
        shards = [await self._shard_at(file_path) for file_path in located.paths.values()]
        tie = await threads.run(possible_tie, Checkpoint(tuple(shards)), name)
        for file_path, shard in zip(located.paths.values(), shards, strict=True):
            if tie is not None and tie.stored_name in shard.header:
                return file_path
        raise unknown(key, name)

    async def _shard_at(self, file_path: str) -> OpenedFile:
        return await self._read(key_of(file_path), file_path, _shard_of)

    async def _locate(self, key: str, path: ShardFile) -> _Located:
        store = open_store(path, self._options)
        threads = DaemonThreads(1, "asyncshard-work")
        account = self._cache.open_account()
        try:
            found = await choose_files(store, self._selection, threads)
            account.charge_headers(_INDEX_FACTOR * found.index_bytes, store.url)
        except BaseException:
            self._cache.discard(account)
            raise
        finally:
            await threads.aclose()
            await wait_to_end(asyncio.ensure_future(store.aclose()))
        paths = {name: store.path_of(name) for name in found.files}
        self._forget_location(key)
        self._located[key] = located = _Located(paths, found.weight_map, account, {})
        self.budget.reclaim_for_waiters()
        return located

    def _forget_location(self, key: str) -> bool:
        located = self._located.pop(key, None)
        if located is not None:
            self._cache.discard(located.account)
        return located is not None


class _Located(NamedTuple):
    """Where a checkpoint's files are."""

    paths: dict[str, str]
    """By name, in plan order."""
    weight_map: WeightMap | None
    account: Account
    tied: dict[str, str]
    """Paths of the files with what names may be tied to that no file holds."""

    def file_of(self, name: str) -> str | None:
        """Return the path of the file in which the index places a tensor."""
        place = -1 if self.weight_map is None else self.weight_map.find(name)
        return None if self.weight_map is None or place < 0 else self.paths.get(self.weight_map.files[place])


_INDEX_FACTOR = 2
"""Bytes that a weight map takes for each of its index, about."""


async def _shard_of(opened: Opened, file: CachedFile) -> OpenedFile:
    return file.shard
