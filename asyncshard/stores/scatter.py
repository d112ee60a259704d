"""Bytes that arrive in pieces, written into several buffers one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice

SMALL = 64 << 10
"""A buffer with less than 64 KiB left gets its bytes by way of a staging buffer: a system call for each costs more."""


class Scatter:
    """Fill buffers one after the other; large ones without another copy.

    Parameters
    ----------
    buffers : sequence of memoryview
        Writable and contiguous. They belong to the caller, who must not use them until the read has ended.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
        self._current = 0
        self._offset = 0
        """Bytes of the current buffer that are filled."""
        self._staged: memoryview | None = None
        self._ends = list(accumulate(map(len, self._buffers)))
        """The end of each buffer, counted in bytes over all buffers."""
        self.nbytes = self._ends[-1] if self._ends else 0
        """Bytes of all buffers."""
        self.filled = 0
        """Bytes filled so far. Those of a failed attempt stay, and the next attempt goes on behind them."""

    def window(self, staging: memoryview) -> memoryview:
        """Return memory for the next bytes, no more than are missing; then call `advance` with how many came."""
        room = len(self._buffers[self._current]) - self._offset
        if room >= SMALL or room == self.nbytes - self.filled:
            self._staged = None
            return self._buffers[self._current][self._offset :]
        self._staged = staging[: self.nbytes - self.filled]
        return self._staged

    def advance(self, count: int) -> None:
        """Note that the first `count` bytes of the last window are filled."""
        if self._staged is not None:
            self.write(self._staged[:count])
            return
        self.filled += count
        self._offset += count
        if self._offset == len(self._buffers[self._current]):
            self._current += 1
            self._offset = 0

    def write(self, data: memoryview) -> None:
        """Copy bytes into the next buffers. The caller has no more of them than there is room."""
        at = 0
        while at < len(data):
            buffer = self._buffers[self._current]
            count = min(len(buffer) - self._offset, len(data) - at)
            buffer[self._offset : self._offset + count] = data[at : at + count]
            at += count
            self._offset += count
            if self._offset == len(buffer):
                self._current += 1
                self._offset = 0
        self.filled += len(data)

    def rewind(self) -> None:
        """Begin again with the first buffer."""
        self._current = self._offset = self.filled = 0

    def views(self, start: int, stop: int) -> list[memoryview]:
        """Return the memory of the bytes [start, stop), counted over all buffers."""
        if (start, stop) == (0, self.nbytes):
            return list(self._buffers)
        views: list[memoryview] = []
        if start >= stop:
            return views
        first = bisect_right(self._ends, start)
        for buffer, end in zip(islice(self._buffers, first, None), islice(self._ends, first, None), strict=True):
            at = end - len(buffer)
            if at >= stop:
                break
            views.append(buffer[max(start - at, 0) : min(stop - at, len(buffer))])
        return views
