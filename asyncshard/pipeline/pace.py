"""Let the event loop run while a coroutine works through many small things."""

from __future__ import annotations

import asyncio
import time

SLICE_S = 0.0005
"""A timer that is due waits for up to three slices: its own wake-up takes two turns of the loop."""


class Pace:
    """Give way about twice a millisecond: ``if pace.is_due(): await pace.give_way()``."""

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due = time.perf_counter() + SLICE_S

    def is_due(self) -> bool:
        return time.perf_counter() >= self._due

    async def give_way(self) -> None:
        await asyncio.sleep(0)
        self._due = time.perf_counter() + SLICE_S
