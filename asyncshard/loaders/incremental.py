"""A loader of single shards and tensors, with a cache in memory."""

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
"""Function of a tensor's name and the tensor. If it returns an awaitable, that is awaited."""


class IncrementalShardLoader(Loader):
    """Loads single shards and tensors on demand, and keeps the shards that were used last in memory.

    The memory budget bounds the bytes of the cache, including headers, and `cache_size` bounds the number of shards.
    The least recently used shard is evicted first. A cached shard is a snapshot of its file: it stays as it was read,
    even if the file changes, until it is evicted. All callers share the tensors. NumPy arrays are read-only; torch
    tensors cannot be read-only, and must not be written to.

    Tensors of an evicted shard that are still in use count against the budget (`CacheStatistics.bytes_held`) until they
    die. They leave the budget earlier if there is no other way to read what is asked for.

    Within ``async with loader:`` files and connections stay open between calls. The end of the block closes them and
    empties the cache, like `aclose`. Without the block each call that reads opens and closes its own files.

    Parameters
    ----------
    base_loader : loader, optional
        A loader whose selection of files, options and memory budget this loader takes over. Options that are passed
        here replace those of the other loader.
    memory_budget_mb : float, optional
        Size of a separate memory budget, in units of 2**20 bytes.
    cache_size : int, optional
        The largest number of shards that have tensors in the cache; by default only the budget bounds the cache.
    **tuning
        Further options: see `Options`.

    Raises
    ------
    ValueError, TypeError
        An option is out of range or does not exist.
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

    def _facts(self) -> tuple[str, ...]:
        cached = self.statistics()
        return *super()._facts(), f"cache_size={self._cache_size}", f"{cached.shards_cached} shards cached"

    async def __aenter__(self) -> Self:
        self._sources.are_kept = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Empty the cache, and close files and connections. Those that a read still uses are closed at its end.

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
        """Return the tensors of one file as a read-only mapping of name to tensor.

        With a `tp_plan` the mapping has this rank's slices, and with a `tensor_filter` only the wanted tensors. It also
        has the names that the file's metadata ties to these tensors, in the same memory, except for names that have a
        rule of their own in the plan. `get_tensor` knows those names, too, and the ties of ``config.json``.

        Tasks that ask for the same file at the same time share one read. If one of them is cancelled, the others go on;
        if all are cancelled, the read stops.

        Parameters
        ----------
        shard_file : str or path
            A local path or URL of one ``.safetensors`` file.

        Raises
        ------
        BudgetError
            The file's tensors and header exceed the budget.
        FormatError, ObjectNotFoundError, AccessDeniedError, NotRegularFileError, StoreError
            The file could not be read. The next call tries again.
        """
        key = key_of(shard_file)
        file = self._cache.find(key)
        if file is not None and file.tensors is not None:
            self._cache.hits += 1
            return file.tensors
        self._cache.misses += 1
        return await self._reads.run(key, lambda: self._read(key, shard_file, self._reader.read_file))

    async def get_tensor(self, path: ShardFile, name: str) -> Any:
        """Return one tensor, without reading the bytes of others. A tied tensor shares the memory of the stored one.

        Parameters
        ----------
        path : str or path
            A local path or URL of a ``.safetensors`` file, or of a directory or prefix that holds a checkpoint.
        name : str
            Name of a stored tensor, or a name that is tied to one by the file's metadata or by ``config.json``. If
            `path` is one file of several, ``config.json`` is not read.

        Raises
        ------
        NamesError
            There is no tensor of this name.
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
        """Call ``callback(name, tensor)`` for every tensor in plan order. If it returns an awaitable, that is awaited.

        While the callback runs, the next tensors are read, at most `prefetch_count` read items ahead and within the
        memory budget, however large the checkpoint is. Cached shards are delivered from the cache. Other shards are not
        cached, since a large checkpoint would evict everything.

        Raises
        ------
        Exception
            An error of the callback, with a note that names the tensor. It stops the load.
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
                del tensor  # otherwise it would count as held while the next one is read

    def statistics(self) -> CacheStatistics:
        """Return a snapshot of the cache: counts of hits and misses, and the bytes in memory."""
        return self._cache.statistics(reads_in_flight=len(self._reads))

    def evict(self, path: ShardFile) -> bool:
        """Drop a file from the cache, or the list of a checkpoint's files; return whether it was cached.

        The next call reads it again. Tensors that are in use stay valid.
        """
        key = key_of(path)
        is_known = self._locations.forget(key)
        return self._cache.evict(key) or is_known

    def clear(self) -> None:
        """Drop everything from the cache. Tensors that are in use stay valid."""
        self._locations.clear()
        self._cache.clear()

    # Reads, each of which runs in a task that all its waiters share

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
                    self._cache.evict(key)  # the cached header was that of an older file

    async def _file_of(self, path: ShardFile, name: str) -> str:
        """Return the path of the file that holds a tensor of a checkpoint."""
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
