"""The interface of a transfer: a way of reading tensors, through buffers or straight into their destinations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from asyncshard._core import Lease
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.checkpoint.ties import find_ties, ties_of
from asyncshard.pipeline.checkpoint.version import version_of
from asyncshard.plan.items import ReadItem
from asyncshard.stores.base import Pacing
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.threads import DaemonThreads


class Reading(NamedTuple):
    """The checkpoint that a transfer reads, and how it is read."""

    checkpoint: Checkpoint
    pacing: Pacing
    """Sizes and numbers of reads."""
    threads: DaemonThreads
    """Threads for work that must not run on the event loop."""

    async def with_ties(self) -> Reading:
        """Return a reading whose checkpoint has also the tied tensors, and the ties that ``config.json`` tells."""
        checkpoint = await find_ties(self.checkpoint, self.threads)
        return self._replace(checkpoint=checkpoint.with_tied())


class Transfer(ABC):
    """A plan of read items, with the functions that read an item and deliver its tensors.

    A transfer looks at the metadata of all tensors when it is made: make it in a thread.
    """

    is_in_place: bool
    """Whether reads write into the caller's own memory: a cancelled read must end before the caller goes on."""

    def __init__(self, reading: Reading) -> None:
        self.checkpoint, self.pacing, self._threads = reading
        self._reader = self.checkpoint.reader
        self.items: Sequence[ReadItem] = ()
        self.bytes_total = 0
        self.tensors_total = 0
        self.missing: tuple[str, ...] = ()
        self.unexpected: tuple[str, ...] = ()
        self.narrowed: tuple[str, ...] = ()
        self.version = version_of(self.checkpoint)
        self.ties = ties_of(self.checkpoint)

    @abstractmethod
    def buffer_bytes(self, item: ReadItem) -> int:
        """Return the bytes of the buffer that an item needs; 0 if it needs none."""

    def prepare(self, item: ReadItem) -> int:
        """Return the bytes of the buffer for an item that is to be read now: `buffer_bytes` or less."""
        return self.buffer_bytes(item)

    @abstractmethod
    async def read(self, item: ReadItem, lease: Lease | None) -> None:
        """Read an item. No write follows after it has returned or raised. It may be called again after a cancel."""

    @abstractmethod
    def deliver(self, item: ReadItem, lease: Lease | None) -> Iterator[tuple[str, Any, int]]:
        """Yield each tensor that this item completes: its name, the tensor, and its number of bytes."""

    def progress(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the caller's tensors that are complete, and of those that are partly written."""
        return (), ()

    async def _read_range(self, item: ReadItem, buffer: memoryview) -> None:
        """Read an item's bytes into one buffer, in chunks that are read concurrently."""
        file, read_into = self.checkpoint.shards[item.shard], self._reader.read_into
        chunk = self.pacing.chunk_size
        if item.nbytes <= chunk:
            if item.nbytes:
                await read_into(file, item.start, [buffer[: item.nbytes]])
            return
        starts = range(0, item.nbytes, chunk)
        reads = (read_into(file, item.start + at, [buffer[at : min(at + chunk, item.nbytes)]]) for at in starts)
        await run_bounded(len(starts), reads, on_failure="cancel")
