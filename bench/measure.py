"""Instruments: they measure peak memory and the event loop's lag, and control what is in the page cache."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

_STATUS = Path("/proc/self/status")
_TICK_S = 0.001
"""The ticker asks the event loop for a turn every millisecond."""


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


class PeakMemory:
    """Measures the peak of the resident memory during a ``with`` block, mapped files included."""

    def __init__(self) -> None:
        self.extra_bytes = 0
        """The peak during the block, less the resident memory before it."""
        self.is_exact = True
        """False if the kernel does not let the peak be reset: `extra_bytes` is then a lower bound."""

    def __enter__(self) -> Self:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.is_exact = False
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        peak = _status_bytes("VmHWM") if self.is_exact else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        self.extra_bytes = max(peak - self._before, 0)


class Ticker:
    """Asks the event loop for a turn every millisecond during an ``async with`` block, and notes how late it comes."""

    def __init__(self) -> None:
        self._lateness: list[float] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.sleep(2 * _TICK_S)  # so that a turn which is late now is counted
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._lateness.append(time.perf_counter() - due)

    def milliseconds(self) -> dict[str, float]:
        """Return percentiles of the lag. uvloop counts in whole milliseconds and may be early: that counts as 0."""
        late = np.maximum(self._lateness, 0) * 1e3
        p50, p99 = np.percentile(late, (50, 99))
        return {"p50": float(p50), "p99": float(p99), "max": float(late.max()), "ticks": len(late)}


def drop_from_page_cache(paths: Iterable[Path]) -> float:
    """Drop these files from the page cache; return the share of their pages that stayed there."""
    resident = total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            pages = _resident_pages(fd)
        finally:
            os.close(fd)
        resident += int(pages.sum())
        total += len(pages)
    return resident / max(total, 1)


def read_into_page_cache(paths: Iterable[Path]) -> None:
    """Read files once, so that they are in the page cache."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _resident_pages(fd: int) -> np.ndarray:
    """Return for each page of a file whether it is in the page cache. The file is not read."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view))
        if libc.mincore(address, length, ctypes.c_void_p(pages.ctypes.data)):
            raise OSError(ctypes.get_errno(), "mincore")
        del view
    return pages & 1
