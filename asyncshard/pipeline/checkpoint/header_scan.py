"""Read the headers of very many files, a few at a time, and keep of each only what a caller makes of it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeGuard, TypeVar

from asyncshard.errors import AsyncShardError, BudgetError, FormatError, ObjectChangedError, StoreError
from asyncshard.format.header import Header, HeaderLimits
from asyncshard.pipeline.checkpoint.opened_file import open_header, parse_opened
from asyncshard.stores.base import Store
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.threads import DaemonThreads

T = TypeVar("T")

_HEADERS_AT_ONCE = 8
_OF_THIS_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class HeaderScan(Generic[T]):
    """Reads headers within a limit of memory.

    Parameters
    ----------
    keep : callable
        Takes the name of a file and its header, in a thread, and returns what is kept of it.
    limits : HeaderLimits
        Of each file's header.
    memory_bytes : int
        For all headers that are read and parsed at once.
    """

    def __init__(
        self,
        store: Store,
        threads: DaemonThreads,
        keep: Callable[[str, Header], T],
        *,
        limits: HeaderLimits,
        memory_bytes: int,
    ) -> None:
        self._store = store
        self._threads = threads
        self._keep = keep
        self._limits = limits
        self._memory_bytes = memory_bytes
        self._taken = 0
        self._given_back = asyncio.Event()

    async def run(self, names: Sequence[str]) -> list[T | AsyncShardError]:
        """Return for each file what is kept of it, or what is wrong with it.

        Raises
        ------
        StoreError
            The storage does not answer, or this process cannot open more files: no fault of any file.
        BudgetError
            A header takes more than the limit of memory.
        """
        jobs = (self._try(name) for name in names)
        return await run_bounded(min(_HEADERS_AT_ONCE, len(names)), jobs, on_failure="finish")

    async def _try(self, name: str) -> T | AsyncShardError:
        try:
            return await self._read(name)
        except Exception as error:
            if is_about_the_file(error):
                return error
            raise

    async def _read(self, name: str) -> T:
        opened = await open_header(self._store, name, self._limits)
        async with self._memory(opened.parse_bytes, opened.path):
            return await parse_opened(
                self._store, opened, self._threads, lambda header: self._keep(name, header), self._limits
            )

    @asynccontextmanager
    async def _memory(self, nbytes: int, path: str) -> AsyncIterator[None]:
        limit = self._memory_bytes
        if nbytes > limit:
            raise BudgetError(
                f"{path}: its header needs {nbytes:,} bytes, more than the limit of {limit:,} bytes; raise "
                "memory_budget_mb",
                path=path,
                needed_bytes=nbytes,
                budget_bytes=limit,
            )
        while self._taken + nbytes > limit:
            self._given_back.clear()
            await self._given_back.wait()
        self._taken += nbytes
        try:
            yield
        finally:
            self._taken -= nbytes
            self._given_back.set()


def is_about_the_file(error: Exception) -> TypeGuard[FormatError | StoreError]:
    """Return whether an error says of one file what is wrong with it; otherwise others would fail in the same way."""
    if isinstance(error, StoreError):
        return isinstance(error, ObjectChangedError) or not (error.retryable or error.errno in _OF_THIS_PROCESS)
    return isinstance(error, FormatError)
