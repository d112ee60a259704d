"""Parts of files as if they were files: what a rank has of a checkpoint that was not cut for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from asyncshard.plan.file_slices.file_slice import FileSlice
from asyncshard.stores.base import ObjectMeta, Store
from asyncshard.stores.ranges import Scratch, cutter
from asyncshard.stores.wrapper import WrapperStore
from asyncshard.tasks.threads import DaemonThreads

_MAX_RANGES = 1 << 15
"""Listed at once: they take 16 bytes each, and several times that while they are found."""
_FEW_RANGES = 512
"""As many are listed on the event loop."""


class SlicedVersion(NamedTuple):
    """What stands behind a part: the `ObjectMeta.version` of it."""

    whole: ObjectMeta
    """The real object."""
    part: FileSlice


def part_meta(whole: ObjectMeta, part: FileSlice) -> ObjectMeta:
    """Return what a part of an object is called and pinned by."""
    return ObjectMeta(whole.name, part.header.file_size, SlicedVersion(whole, part))


class SlicedStore(WrapperStore):
    """Reads parts of another store's objects; objects that are no parts pass through. Closing it leaves that open.

    Parameters
    ----------
    store : Store
    threads : DaemonThreads
        For long lists of ranges.
    scratch : Scratch
        For reads that cover several ranges.
    """

    def __init__(self, store: Store, threads: DaemonThreads, scratch: Scratch) -> None:
        super().__init__(store)
        self._threads = threads
        self._scratch = scratch

    async def aclose(self) -> None:
        """Leave the other store open."""

    def fingerprint(self, meta: ObjectMeta) -> str | None:
        # The slices belong to it: two ranks' parts of one file are not the same.
        if not isinstance(meta.version, SlicedVersion):
            return self.store.fingerprint(meta)
        whole = self.store.fingerprint(meta.version.whole)
        return None if whole is None else f"{whole} sliced:{meta.version.part.digest}"

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        if not isinstance(meta.version, SlicedVersion):
            await self.store.read_into(meta, start, buffers)
            return
        part = meta.version.part
        stop = start + sum(buffer.nbytes for buffer in buffers)
        cut = cutter(buffers)
        next(cut)
        for first, last in part.batches(start, stop, _MAX_RANGES):
            ranges: Any
            if part.count(first, last) > _FEW_RANGES:
                ranges = await self._threads.run(part.ranges, first, last)
            else:
                ranges = part.ranges(first, last)
            await self.store.read_ranges(
                meta.version.whole, ranges.offsets, ranges.lengths, cut.send(last - first), scratch=self._scratch
            )
