"""One file of a checkpoint: open it, read its header and validate it. No tensor data is read here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from asyncshard.format.header import Header, HeaderLimits, header_size, parse_header
from asyncshard.pipeline.memory.budget import Account
from asyncshard.plan.file_slices.file_slice import FileSlice
from asyncshard.stores.base import ObjectMeta, Store
from asyncshard.tasks.threads import DaemonThreads

T = TypeVar("T")

_FIRST_READ = 64 << 10
"""Enough for the header of most shards in one read."""
_PARSE_FACTOR = 2.5
"""Bytes that parsing takes for each byte of a header, itself included."""


class OpenedFile(NamedTuple):
    """One opened file of a checkpoint."""

    meta: ObjectMeta
    path: str
    """Its full path or URL."""
    header: Header
    """The header of the file; of its slice where it has one."""
    slice: FileSlice | None = None
    """The slice of the file that is read; None where the whole file is."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its facts take."""
        return self.header.nbytes if self.slice is None else self.slice.nbytes

    @property
    def data_bytes(self) -> int:
        """Bytes of its tensors."""
        return self.header.file_size - self.header.size

    def is_same(self, other: OpenedFile) -> bool:
        """Return whether the other is the same version of the same object, and the same slice of it."""
        return (self.meta, self.slice) == (other.meta, other.slice)


class FileReader:
    """Reads the tensors of opened files from the store that they were opened in, which it leaves open."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def fingerprint(self, file: OpenedFile) -> str | None:
        """Return text that changes when what is read of a file does; None where the store cannot tell."""
        return self.store.fingerprint(file.meta)

    async def read_into(self, file: OpenedFile, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the bytes from `start` on, an offset as in the file's header.

        Errors, and what holds when it is cancelled, are those of `Store.read_into`.
        """
        await self.store.read_into(file.meta, start, buffers)


class OpenedHeader(NamedTuple):
    """A file that is open, and how large its header is."""

    meta: ObjectMeta
    path: str
    head: bytes
    """The file's first bytes."""
    size: int
    """Bytes of the file before the tensors' data."""

    @property
    def parse_bytes(self) -> int:
        """Bytes of memory that it takes to read and parse the header."""
        return int(self.size * _PARSE_FACTOR)


async def open_header(store: Store, name: str, limits: HeaderLimits) -> OpenedHeader:
    """Open a file and read the length of its header."""
    path = store.path_of(name)
    meta, head = await store.open(name, _FIRST_READ)
    size = header_size(head, meta.size, max_header_bytes=limits.max_header_bytes, path=path)
    return OpenedHeader(meta, path, head, size)


async def parse_opened(
    store: Store,
    opened: OpenedHeader,
    threads: DaemonThreads,
    then: Callable[[Header], T],
    limits: HeaderLimits,
) -> T:
    """Read and validate the rest of a header, and return what `then` makes of it, in the same thread."""
    meta, path, head, size = opened
    if size > len(head):
        data = np.empty(size, np.uint8)
        data[: len(head)] = np.frombuffer(head, np.uint8)
        await store.read_into(meta, len(head), [data.data[len(head) :]])
    else:
        data = np.frombuffer(head, np.uint8)
    # The thread gets the only reference: freeing a large header is no work for the loop.
    holder = [data]
    del data, head

    def parse() -> T:
        header = parse_header(
            holder.pop().data,
            meta.size,
            max_tensors=limits.max_tensors,
            max_header_bytes=limits.max_header_bytes,
            path=path,
        )
        return then(header)

    return await threads.run(parse)


async def read_header_of(
    store: Store, name: str, threads: DaemonThreads, limits: HeaderLimits, account: Account | None
) -> OpenedFile:
    """Read and validate the header of one file; its memory is charged to `account`, if there is one."""
    opened = await open_header(store, name, limits)
    if account is not None:
        account.charge_headers(opened.parse_bytes, opened.path)
    header: Header = await parse_opened(store, opened, threads, lambda parsed: parsed, limits)
    if account is not None:
        account.charge_headers(header.nbytes - opened.parse_bytes, opened.path)
    return OpenedFile(opened.meta, opened.path, header)
