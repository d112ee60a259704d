"""Long work done in slices of half a millisecond, so that the event loop or another thread can run between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from asyncshard.tasks.threads import raise_if_abandoned

T = TypeVar("T")

SLICE_S = 0.0005
"""0.5 ms of work between two yields. A timer that is due may wait for three slices: its wake-up takes two turns of the
loop."""


class LoopYield:
    """Tells a coroutine when to yield to the event loop: ``if loop_yield.is_due(): await loop_yield.give_way()``."""

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due = time.perf_counter() + SLICE_S

    def is_due(self) -> bool:
        """Return whether the coroutine has run for 0.5 ms since it last yielded."""
        return time.perf_counter() >= self._due

    async def give_way(self) -> None:
        """Let the event loop run its other tasks once."""
        await asyncio.sleep(0)
        self._due = time.perf_counter() + SLICE_S


def yielding_gil(items: Iterable[T]) -> Iterator[T]:
    """Yield the items unchanged, and release the GIL every 0.5 ms: for a thread that iterates over very many items.

    Raises
    ------
    concurrent.futures.CancelledError
        In a call of `DaemonThreads.run`, when the caller was cancelled: the call ends here.
    """
    due = time.perf_counter() + SLICE_S
    for item in items:
        yield item
        if time.perf_counter() >= due:
            time.sleep(0)
            raise_if_abandoned()
            due = time.perf_counter() + SLICE_S
