"""Let the event loop run while a coroutine, or another thread, works through many small things."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

SLICE_S = 0.0005
"""A timer that is due waits for up to three slices: its own wake-up takes two turns of the loop."""


class LoopYield:
    """Give way about twice a millisecond: ``if pace.is_due(): await pace.give_way()``."""

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due = time.perf_counter() + SLICE_S

    def is_due(self) -> bool:
        return time.perf_counter() >= self._due

    async def give_way(self) -> None:
        await asyncio.sleep(0)
        self._due = time.perf_counter() + SLICE_S


def yielding_gil(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, and let go of the GIL about twice a millisecond; for a thread that works through very many."""
    due = time.perf_counter() + SLICE_S
    for item in items:
        yield item
        if time.perf_counter() >= due:
            time.sleep(0)
            due = time.perf_counter() + SLICE_S
