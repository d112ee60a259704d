"""Slices of files, read as if they were files: what a rank has of a checkpoint that was not cut for it."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.pipeline.checkpoint.opened_file import FileReader, OpenedFile
from asyncshard.plan.file_slices.file_slice import FileSlice, Ranges
from asyncshard.stores.base import Store
from asyncshard.stores.ranges import Scratch, cutter
from asyncshard.tasks.threads import DaemonThreads

_MAX_RANGES = 1 << 15
"""Ranges listed at once: they take 16 bytes each, and several times that while they are found."""
_FEW_RANGES = 512
"""Up to this many ranges are listed on the event loop."""


class SliceReader(FileReader):
    """Reads slices of files by their byte ranges, and files without a slice as they are.

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

    def fingerprint(self, file: OpenedFile) -> str | None:
        # The slice belongs to it: two ranks' slices of one file are not the same.
        whole = super().fingerprint(file)
        return whole if whole is None or file.slice is None else f"{whole} sliced:{file.slice.digest}"

    async def read_into(self, file: OpenedFile, start: int, buffers: Sequence[memoryview]) -> None:
        if file.slice is None:
            await super().read_into(file, start, buffers)
            return
        stop = start + sum(buffer.nbytes for buffer in buffers)
        cut = cutter(buffers)
        next(cut)
        for first, last in file.slice.batches(start, stop, _MAX_RANGES):
            offsets, lengths = await self._ranges(file.slice, first, last)
            await self.store.read_ranges(file.meta, offsets, lengths, cut.send(last - first), scratch=self._scratch)

    async def _ranges(self, file_slice: FileSlice, start: int, stop: int) -> Ranges:
        if file_slice.count(start, stop) <= _FEW_RANGES:
            return file_slice.ranges(start, stop)
        return await self._threads.run(file_slice.ranges, start, stop)
