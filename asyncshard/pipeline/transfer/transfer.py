"""What the pipeline asks of a way to bring tensors in: staged through buffers, or placed where they belong."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from asyncshard._core import Lease
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.checkpoint.ties import ties_of
from asyncshard.pipeline.checkpoint.version import CheckpointVersion
from asyncshard.plan.items import ReadItem
from asyncshard.stores.base import Store
from asyncshard.tasks.threads import all_of


class Pacing(NamedTuple):
    """How much is read at once, and how far ahead."""

    chunk_size: int
    """Bytes of one read at most."""
    prefetch_count: int
    """Read items ahead of the consumer."""
    max_gap_bytes: int
    """Unwanted bytes between two wanted tensors that are rather read than left out."""


class Transfer(ABC):
    """A plan of read items, how each is read, and what it delivers. It looks at metadata: make it in a thread."""

    is_in_place: bool
    """Whether reads write into the caller's own memory: cancelled ones must end before the caller goes on."""

    def __init__(self, checkpoint: Checkpoint, store: Store, pacing: Pacing) -> None:
        self.checkpoint = checkpoint
        self._store = store
        self.pacing = pacing
        self.items: Sequence[ReadItem] = ()
        self.bytes_total = 0
        self.tensors_total = 0
        self.missing: tuple[str, ...] = ()
        self.unexpected: tuple[str, ...] = ()
        self.narrowed: tuple[str, ...] = ()
        self.version = CheckpointVersion.of(checkpoint, store)
        self.ties = ties_of(checkpoint)

    @property
    def retries(self) -> int:
        """Requests that the store made again."""
        return self._store.retries

    @property
    def max_gap_bytes(self) -> int:
        """Unwanted bytes between slices that are rather read than left out."""
        return self._store.max_gap_bytes

    @property
    def verified(self) -> tuple[str, ...]:
        """Objects that match their checksums."""
        return self._store.verified

    @property
    def unverified(self) -> tuple[str, ...]:
        """Objects that were to be compared with their checksums and have not been."""
        return self._store.unverified

    @abstractmethod
    def buffer_bytes(self, item: ReadItem) -> int:
        """Return how large a buffer an item needs, in bytes; 0 for none."""

    def prepare(self, item: ReadItem) -> int:
        """Return how large a buffer an item needs that is to be read now, never more than `buffer_bytes`."""
        return self.buffer_bytes(item)

    @abstractmethod
    async def read(self, item: ReadItem, lease: Lease | None) -> None:
        """Read an item; nothing writes after it has returned or raised. It may be called again after a cancel."""

    @abstractmethod
    def deliver(self, item: ReadItem, lease: Lease | None) -> Iterator[tuple[str, Any, int]]:
        """Yield name, tensor and bytes of each tensor that is complete with this item."""

    def progress(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the caller's tensors that are whole, and of those partly written."""
        return (), ()

    async def _read_range(self, item: ReadItem, buffer: memoryview) -> None:
        """Read an item's bytes into one buffer, in chunks that are in flight together."""
        meta = self.checkpoint.shards[item.shard].meta
        chunk = self.pacing.chunk_size
        if item.nbytes <= chunk:
            if item.nbytes:
                await self._store.read_into(meta, item.start, [buffer[: item.nbytes]])
            return
        reads = [
            asyncio.ensure_future(
                self._store.read_into(meta, item.start + at, [buffer[at : min(at + chunk, item.nbytes)]])
            )
            for at in range(0, item.nbytes, chunk)
        ]
        await all_of(reads)
