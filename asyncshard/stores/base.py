"""The interface of stores: a few verbs over the files of one checkpoint.

A store names objects by their path below its root, with ``/`` between parts. It bounds how many reads are in flight
(`max_workers`) and knows nothing of tensors, plans or budgets. A new store needs `list`, `open` and `read_into`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple, Self

from asyncshard._typing import Int64Array
from asyncshard.errors import FormatError
from asyncshard.events import Event, Listener
from asyncshard.stores.ranges import Scratch, read_ranges
from asyncshard.tasks.threads import DaemonThreads


class ObjectMeta(NamedTuple):
    """One object, pinned: its reads fail if it is no longer the one that was opened."""

    name: str
    """Path below the store's root."""
    size: int
    """Bytes."""
    version: Any
    """Value that differs for a replaced object: device, inode and times of a file, the ETag of an S3 object."""


class Listing(NamedTuple):
    """The files at a store's root."""

    names: tuple[str, ...]
    """Names of the files directly below the root."""
    is_file: bool
    """Whether the root is one file; `names` then holds just its name."""


class Pacing(NamedTuple):
    """How much of a store is read at once, and how far ahead of the consumer."""

    chunk_size: int = 16 << 20
    """Bytes of one read at most."""
    prefetch_count: int = 8
    """Read items ahead of the consumer at most."""
    max_gap_bytes: int = 0
    """Gaps up to this many bytes between wanted byte ranges are read too, to save a request."""

    def override(self, chunk_size: int | None, prefetch_count: int | None) -> Pacing:
        """Return this pacing with the numbers that are not None in place of its own."""
        return Pacing(chunk_size or self.chunk_size, prefetch_count or self.prefetch_count, self.max_gap_bytes)


class State(Enum):
    """Where a store is in its life."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Store(ABC):
    """Files of one checkpoint. An asynchronous context manager: `aclose` ends its threads and connections.

    A store may be used by several loads, also at once. It belongs to one event loop.
    """

    url: str
    """How messages name the store; it holds no secret."""
    pacing: Pacing = Pacing()
    """The pacing for loads whose user says nothing about it. It stays the same while the store is used."""
    held_bytes: int = 0
    """Bytes of memory that the store may take beside the buffers that it fills; they count against a load's budget."""
    has_own_scratch: bool = False
    """Whether this class's `read_ranges` needs no scratch memory of the caller's."""

    def __repr__(self) -> str:
        facts = ", ".join(self._facts())
        return f"<{type(self).__name__} {self.url!r}{' ' * bool(facts)}{facts}>"

    def _facts(self) -> tuple[str, ...]:
        """Return what the store's repr says beside its URL: its state, and how busy it is. Never a secret."""
        return ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:  # noqa: B027 - nothing to close is a good default
        """Release threads, files and connections. The caller has awaited all reads."""

    @contextmanager
    def reporting_to(self, listener: Listener) -> Iterator[None]:
        """Call a listener with every event of this store until the context ends, beside those that listen already.

        Loads that use one store at once all hear of everything that it does, for whichever of them.
        """
        listeners = self._listeners()
        listeners.append(listener)
        try:
            yield
        finally:
            listeners.remove(listener)

    def report(self, event: Event) -> None:
        """Call all listeners with an event; for stores, from any thread."""
        for listener in tuple(self._listeners()):
            listener(event)

    def _listeners(self) -> list[Listener]:
        """Return the list of this store's listeners, which is made in one step even if several threads ask for it."""
        listeners: list[Listener] = vars(self).setdefault("_listening", [])
        return listeners

    def path_of(self, name: str) -> str:
        """Return the full path or URL of an object, for messages and for the user."""
        return f"{self.url.rstrip('/')}/{name}"

    def fingerprint(self, meta: ObjectMeta) -> str | None:
        """Return text that changes when the object of this name does. It is the same in every process.

        Text that begins with `ETAG` and holds an MD5 is also the same for the same content under other names. None
        where the store cannot tell: then the object counts as changed.
        """
        return None

    def identity(self, meta: ObjectMeta) -> str | None:
        """Return text that names this version of this object, and no other, in every process: the key of a cache.

        None where there is no such text, or where a copy on this machine's disk would gain nothing.
        """
        return None

    @abstractmethod
    async def list(self) -> Listing:
        """List the root.

        Raises
        ------
        ObjectNotFoundError, AccessDeniedError
        """

    @abstractmethod
    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        """Pin an object and read its first `nbytes` bytes, or all of a shorter one.

        Raises
        ------
        ObjectNotFoundError, AccessDeniedError, NotRegularFileError, StoreError
        """

    @abstractmethod
    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the object's bytes from `start` on.

        All buffers are filled, or it is an error; bytes of another object are never among them. When this returns or
        raises, cancelled or not, nothing writes into the buffers any more.

        Raises
        ------
        ObjectChangedError
            The object is not the one that was opened.
        TruncatedError, StoreError
        """

    async def read_ranges(
        self,
        meta: ObjectMeta,
        offsets: Int64Array,
        lengths: Int64Array,
        buffers: Sequence[memoryview],
        *,
        max_gap: int | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Fill `buffers`, one after the other, with byte ranges of an object, one after the other.

        All buffers are filled, or it is an error. When this returns or raises, cancelled or not, nothing writes into
        the buffers any more.

        Parameters
        ----------
        offsets, lengths : arrays of int64
            The ranges: ascending, no two overlap, none is empty. Together they have as many bytes as the buffers.
        max_gap : int, optional
            Gaps up to this many bytes are read too, to save a request; by default `pacing.max_gap_bytes`.
        scratch : Scratch, optional
            Memory for reads that cover several ranges; by default 16 MiB at most, for this call.

        Raises
        ------
        ObjectChangedError, TruncatedError, StoreError
        """
        if not len(offsets):
            return
        if scratch is None:
            threads = DaemonThreads(1, "asyncshard-gather")
            try:
                await self.read_ranges(meta, offsets, lengths, buffers, max_gap=max_gap, scratch=Scratch(threads))
            finally:
                await threads.aclose()
            return
        await read_ranges(
            lambda start, memory: self.read_into(meta, start, memory),
            offsets,
            lengths,
            buffers,
            max_gap=self.pacing.max_gap_bytes if max_gap is None else max_gap,
            scratch=scratch,
        )

    async def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read a small object whole.

        Raises
        ------
        FormatError
            The object has more than `max_bytes`; nothing is read then.
        ObjectNotFoundError, AccessDeniedError, NotRegularFileError, StoreError
        """
        meta, head = await self.open(name, _SMALL)
        require_small(meta.size, max_bytes, self.path_of(name))
        rest = bytearray(meta.size)
        rest[: len(head)] = head
        if len(head) < meta.size:
            await self.read_into(meta, len(head), [memoryview(rest)[len(head) :]])
        return bytes(rest)


def require_small(nbytes: int, max_bytes: int | None, path: str) -> None:
    """Raise FormatError for an object that is to be read whole and is too large for that."""
    if max_bytes is not None and nbytes > max_bytes:
        raise FormatError(
            f"{path}: it has {nbytes:,} bytes, over the limit of {max_bytes:,} for such a file", path=path
        )


ETAG = "etag:"
"""Beginning of a fingerprint made of an ETag and a size, as in ``etag:"9e107d9d372bb6826bd81d3542a419d6" 1024``."""
_SMALL = 64 << 10
