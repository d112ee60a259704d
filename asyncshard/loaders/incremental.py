"""Random access to shards and tensors, with a cache in memory."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from asyncshard.errors import ObjectChangedError
from asyncshard.loaders.loader import Loader, inherited
from asyncshard.loaders.locations import Locations, file_with
from asyncshard.loaders.options import ReadTuning, require_int
from asyncshard.loaders.sources import ShardFile, Sources, key_of
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.pipeline.memory.budget import trim_in_thread
from asyncshard.pipeline.shard_cache.cache import CachedFile, CacheStatistics, ShardCache
from asyncshard.pipeline.shard_cache.reads import unknown
from asyncshard.pipeline.shard_cache.shard_reader import OpenedFolder, ShardReader
from asyncshard.pipeline.shard_cache.tensors import ShardTensors
from asyncshard.pipeline.shard_cache.transfer import ThroughCache
from asyncshard.pipeline.transfer.stream import Stream
from asyncshard.stores import Store
from asyncshard.stores.opening import ModelPath
from asyncshard.tasks.single_flight import SingleFlight
from asyncshard.tasks.threads import wait_to_end

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
        self._reader = ShardReader(
            self._cache,
            self.selection,
            chunk_size=self.options.chunk_size,
            prefetch_count=self.options.prefetch_count,
        )
        self._headers = SingleFlight()
        self._reads = SingleFlight()
        self._locations = Locations(self.access, self.selection, self._cache)
        self._sources = Sources(self.access, self.options.framework, self.budget)

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
        await trim_in_thread(self.budget)

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
        return await self._reads.run(key, lambda: self._read(key, shard_file, self._reader.read_file))

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
        tensors = None if file is None else file.with_name(name)
        if tensors is not None:
            self._cache.hits += 1
            return tensors[name]
        self._cache.misses += 1

        async def read_it(opened: OpenedFolder, file: CachedFile) -> ShardTensors:
            return await self._reader.read_tensor(opened, file, name, is_whole_model=is_directory)

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
        async with Stream(self._load(path), ThroughCache(self._cache)) as weights:
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
        is_known = self._locations.forget(key)
        return self._cache.evict(key) or is_known

    def clear(self) -> None:
        """Forget everything. Tensors in use stay as they are."""
        self._locations.clear()
        self._cache.clear()

    # Reading, each in a task that the waiters share

    async def _read(
        self,
        key: str,
        path: ShardFile,
        read: Callable[[OpenedFolder, CachedFile], Coroutine[Any, Any, T]],
    ) -> T:
        async with self._sources.opened(path) as opened:
            while True:
                known = self._cache.peek(key)
                shard = known.shard if known else await self._headers.run(key, lambda: self._reader.read_header(opened))
                try:
                    with self._cache.pinned(key, shard) as file:
                        return await read(opened, file)
                except ObjectChangedError:
                    if known is None:
                        raise
                    self._cache.evict(key)  # its header was that of the file before

    async def _file_of(self, path: ShardFile, name: str) -> str:
        """Return the path of the file of a checkpoint that holds a tensor."""
        key = key_of(path)
        location = self._locations.find(key)
        if location is None:
            location = await self._headers.run(("located", key), lambda: self._locations.locate(key, path))
        file = await file_with(location, name, self._shard_at, self._sources)
        if file is None:
            raise unknown(key, name)
        return file

    async def _shard_at(self, file: str) -> OpenedFile:
        return await self._read(key_of(file), file, _shard_of)


async def _shard_of(opened: OpenedFolder, file: CachedFile) -> OpenedFile:
    return file.shard
